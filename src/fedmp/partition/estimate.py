"""What a stage would cost: the planner's arithmetic, from a profile to seconds and bytes of one micro-batch.

A `CostModel` is built once from a profile and the number of micro-batches; partitioners, `build_plan`
and the bounds all ask it, so that a plan is judged by the same numbers that found it. Every method takes
integers or whole numpy arrays of them and computes both the same way, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmp.records import Profile
from fedmp.topology import Device, Link

__all__ = ["Array", "CostModel", "cost_model", "format_bytes"]

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CostModel:
    """Costs of any run of layers for one micro-batch. Make one with `cost_model`.

    Layers are counted from 0; a position `p` is the place before layer `p`, so that a stage is the
    layers from position `start` to position `stop`.

    Attributes:
        profile: what the costs come from.
        num_microbatches, microbatch_size: how one batch is cut; the size is rounded up.
    """

    profile: Profile
    num_microbatches: int
    microbatch_size: int
    _forward_s: Array
    _backward_s: Array
    _activation_bytes: Array
    _buffer_bytes: Array
    _boundary_bytes: Array
    _gradient_bytes: Array
    _reused_bytes: Array
    _peaks: Array
    _forced: Array
    _pinned: Array
    _pinned_to: Mapping[str, Array]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.profile.layers)

    def positions(self) -> list[int]:
        """Where the model may be cut, with 0 and `num_layers`, ascending."""
        cuttable = [i + 1 for i, layer in enumerate(self.profile.layers[:-1]) if layer.can_cut_after]
        return [0, *cuttable, self.num_layers]

    def forced_positions(self) -> list[int]:
        """Where the model must be cut, ascending."""
        return [i + 1 for i, layer in enumerate(self.profile.layers[:-1]) if layer.must_cut_after]

    def num_broken(self, start: Any, stop: Any, device: Device) -> Any:
        """How many rules layers `start` to `stop` break as a stage on `device`: forced cuts, others' layers."""
        forced = self._forced[np.maximum(stop - 1, start)] - self._forced[start]
        others = self._pinned[stop] - self._pinned[start]
        if device.name in self._pinned_to:
            own = self._pinned_to[device.name]
            others = others - (own[stop] - own[start])
        return forced + others

    def forward_s(self, start: Any, stop: Any, device: Device) -> Any:
        """Seconds of the forward of layers `start` to `stop` on `device`."""
        return (self._forward_s[stop] - self._forward_s[start]) * self._slowness(device)

    def backward_s(self, start: Any, stop: Any, device: Device) -> Any:
        """Seconds of the backward of layers `start` to `stop` on `device`.

        The optimizer's step is spread over the micro-batches, since it is work of the stage like theirs.
        """
        return (self._backward_s[stop] - self._backward_s[start]) * self._slowness(device)

    def send_s(self, position: Any, link: Link) -> Any:
        """Seconds to send the boundary at `position` forward over `link`; 0 where it is empty."""
        return _transfer_s(self._boundary_bytes[position], link)

    def gradient_s(self, position: Any, link: Link) -> Any:
        """Seconds for the gradient of the boundary at `position` to come back over `link`."""
        return _transfer_s(self._gradient_bytes[position], link)

    def boundary_bytes(self, position: Any) -> Any:
        """Bytes sent forward through a cut at `position`; 0 at both ends of the model."""
        return self._boundary_bytes[position]

    def parameter_bytes(self, start: int, stop: int) -> int:
        """Bytes of the parameters of layers `start` to `stop`, each counted once."""
        names = {name for layer in self.profile.layers[start:stop] for name in layer.parameters}
        return sum(self.profile.parameter_bytes[name] for name in names)

    def parameter_matrix(self, positions: Sequence[int]) -> Array:
        """`parameter_bytes(positions[i], positions[j])` for all i and j; 0 where i >= j."""
        size = len(positions)
        starts_before = np.searchsorted(positions, np.arange(self.num_layers), side="right")
        matrix = np.zeros((size, size))
        last_unit: dict[str, int] = {}
        # A parameter's use in unit u, last used in unit v < u, is new to the stages that start after v.
        for index, layer in enumerate(self.profile.layers):
            unit = int(starts_before[index])
            for name in layer.parameters:
                matrix[last_unit.get(name, 0) : unit, unit] += self.profile.parameter_bytes[name]
                last_unit[name] = unit
        return np.cumsum(matrix, axis=1)

    def memory_bytes(self, start: Any, stop: Any, in_flight: Any, parameter_bytes: Any) -> Any:
        """Predicted peak memory of a stage's process, beyond what it takes before it holds any weights.

        Weights, their gradients and the optimizer's copies; buffers; the activations of `in_flight`
        micro-batches; the most that a layer's backward needs beside the activations left by then; frames
        of what is received, held until the backward, with one more on its way, and of what is sent, held
        until the neighbour has surely taken it; and the profile's `process_bytes`.

        Args:
            start, stop: positions of the stage.
            in_flight: the most micro-batches whose activations the stage holds at once.
            parameter_bytes: of the stage, as `parameter_bytes(start, stop)` gives them.
        """
        weights = parameter_bytes * (2.0 + self.profile.optimizer_copies)
        buffers = self._buffer_bytes[stop] - self._buffer_bytes[start]
        # the part of what was received that is kept for backward is in a frame, and counts there
        own = self._activation_bytes[stop] - self._activation_bytes[start] - self._reused_bytes[start]
        activations = in_flight * np.maximum(own, 0.0)
        workspace = np.maximum(self._most(start, stop) - self._activation_bytes[stop], 0.0)
        inputs, input_gradients = (
            min(in_flight + 1, self.num_microbatches),
            min(in_flight + 3, self.num_microbatches),
        )
        outputs, output_gradients = inputs, min(2, self.num_microbatches)
        frames = (
            inputs * self._boundary_bytes[start]
            + input_gradients * self._gradient_bytes[start]
            + outputs * self._boundary_bytes[stop]
            + output_gradients * self._gradient_bytes[stop]
        )
        return weights + buffers + activations + workspace + frames + self.profile.process_bytes

    def _most(self, start: Any, stop: Any) -> Any:
        """The largest sum of activations from the model's start to the end of a layer and its workspace."""
        count = np.maximum(np.asarray(stop) - start, 1)
        level = np.frexp(count)[1] - 1
        width = 1 << level
        return np.maximum(self._peaks[level, start], self._peaks[level, np.maximum(stop - width, start)])

    def _slowness(self, device: Device) -> float:
        return self.profile.reference_flops_per_s / device.flops_per_s


def cost_model(profile: Profile, num_microbatches: int) -> CostModel:
    """Prepare the costs of every run of layers.

    Args:
        profile: costs per sample on the reference device.
        num_microbatches: how many micro-batches one batch is cut into; each has
            `ceil(batch_size / num_microbatches)` samples.

    Raises:
        ValueError: `num_microbatches` is less than 1, or a layer names a parameter without a size.
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches is {num_microbatches}; it must be at least 1")
    for layer in profile.layers:
        for name in layer.parameters:
            if name not in profile.parameter_bytes:
                raise ValueError(
                    f"layer {layer.name!r} uses parameter {name!r}, which has no entry in parameter_bytes"
                )
    size = math.ceil(profile.batch_size / num_microbatches)
    layers = profile.layers
    activation_bytes = size * _prefix([layer.activation_bytes for layer in layers])
    updated_bytes = [sum(profile.parameter_bytes[name] for name in layer.parameters) for layer in layers]
    workspace_bytes = size * np.asarray([layer.workspace_bytes for layer in layers])
    return CostModel(
        profile=profile,
        num_microbatches=num_microbatches,
        microbatch_size=size,
        _forward_s=size * _prefix([layer.forward_s for layer in layers]),
        _backward_s=size * _prefix([layer.backward_s for layer in layers])
        + profile.update_s_per_byte / num_microbatches * _prefix(updated_bytes),
        _activation_bytes=activation_bytes,
        _buffer_bytes=_prefix([layer.buffer_bytes for layer in layers]),
        _boundary_bytes=size * _at_cuts([layer.boundary_bytes for layer in layers]),
        _gradient_bytes=size * _at_cuts([layer.gradient_bytes for layer in layers]),
        _reused_bytes=size * _at_cuts([layer.reused_bytes for layer in layers]),
        _peaks=_range_maxima(activation_bytes[1:] + workspace_bytes),
        _forced=_prefix([layer.must_cut_after for layer in layers]),
        _pinned=_prefix([layer.device is not None for layer in layers]),
        _pinned_to={
            name: _prefix([layer.device == name for layer in layers])
            for name in sorted({layer.device for layer in layers if layer.device is not None})
        },
    )


def format_bytes(num_bytes: float) -> str:
    """Bytes as people read them.

    Example:
        >>> format_bytes(4 << 30)
        '4.0 GiB'
    """
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _transfer_s(num_bytes: Any, link: Link) -> Any:
    return (num_bytes > 0) * (link.latency_s + num_bytes / link.bandwidth_bytes_per_s)


def _prefix(values: Sequence[float]) -> Array:
    return np.concatenate(([0.0], np.cumsum(np.asarray(values, dtype=np.float64))))


def _range_maxima(values: Array) -> Array:
    """`table[k, i]`: the largest of the `2 ** k` values from `i` on, or of as many as there are."""
    table = [np.concatenate([values, [-np.inf]])]
    while 1 << len(table) <= len(values):
        width = 1 << (len(table) - 1)
        ahead = np.concatenate([table[-1][width:], np.full(width, -np.inf)])
        table.append(np.maximum(table[-1], ahead))
    return np.stack(table)


def _at_cuts(values: Sequence[float]) -> Array:
    """By position: nothing crosses the two ends of the model."""
    return np.asarray([0.0, *values[:-1], 0.0])
