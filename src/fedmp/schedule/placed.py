"""Schedules of devices that run several stages: interleaved 1F1B and the V shape."""

from __future__ import annotations

from pydantic import Field

from fedmp.component import Component
from fedmp.schedule.actions import PlacedAction, check_sizes
from fedmp.schedule.greedy import greedy

__all__ = ["Interleaved", "VShape"]


class Interleaved(Component):
    """Interleaved 1F1B: device d runs stages d, d + P, d + 2P, ... (Narayanan et al., 2021, Efficient
    large-scale language model training, section 2.2).

    The bubble shrinks by `stages_per_device`; messages grow by as much. Unlike the paper's order, any
    number of micro-batches will do.

    Args:
        stages_per_device: 2 or more.
    """

    stages_per_device: int = Field(default=2, ge=2)

    @property
    def name(self) -> str:
        """`interleaved`, or `interleaved-3` and so on for more than two stages a device."""
        return "interleaved" if self.stages_per_device == 2 else f"interleaved-{self.stages_per_device}"

    def placement(self, num_devices: int) -> tuple[tuple[int, ...], ...]:
        """Stages in turn."""
        num_stages = num_devices * self.stages_per_device
        return tuple(tuple(range(device, num_stages, num_devices)) for device in range(num_devices))

    def placed_actions(self, num_devices: int, num_microbatches: int) -> list[list[PlacedAction]]:
        """Backwards first where one is ready; forwards in groups of as many micro-batches as devices."""
        check_sizes(num_devices, num_microbatches)
        extra = (self.stages_per_device - 1) * num_devices
        limits = [2 * (num_devices - device - 1) + extra + 1 for device in range(num_devices)]
        return greedy(self.placement(num_devices), num_microbatches, limits, splits=False)


class VShape(Component):
    """Two stages a device, down the devices and up again, so that the first and the last stage share a
    device and neither inputs nor labels leave it (Qi et al., 2024, Pipeline parallelism with controllable
    memory).

    Args:
        splits_backward: fill bubbles with weight gradients, as the paper does.
    """

    splits_backward: bool = True

    @property
    def name(self) -> str:
        """`v-shape`, or `v-shape-whole` where backwards are not split."""
        return "v-shape" if self.splits_backward else "v-shape-whole"

    def placement(self, num_devices: int) -> tuple[tuple[int, ...], ...]:
        """Device d has stages d and 2P - 1 - d."""
        return tuple((device, 2 * num_devices - 1 - device) for device in range(num_devices))

    def placed_actions(self, num_devices: int, num_microbatches: int) -> list[list[PlacedAction]]:
        """No device holds more than 2P stage activations, as many as 1F1B's first device does."""
        check_sizes(num_devices, num_microbatches)
        limits = [2 * num_devices] * num_devices
        return greedy(self.placement(num_devices), num_microbatches, limits, splits=self.splits_backward)
