"""The control: equally many layers to every device, in the order given, whatever they cost."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from fedmp.component import Component
from fedmp.errors import PlanError
from fedmp.partition.bound import step_bound_s
from fedmp.partition.build import build_plan, check_devices
from fedmp.partition.estimate import cost_model
from fedmp.partition.placed import step_bound_placed_s
from fedmp.partition.placed_events import place
from fedmp.partition.search import SCHEDULE_PATTERN
from fedmp.records import Plan, Profile
from fedmp.schedule import placed_schedule_by_name
from fedmp.topology import Device, Links

__all__ = ["Uniform"]


class Uniform(Component):
    """Cut into equal numbers of layers, one run for every device, in the order given.

    Where a cut is forbidden, the nearest allowed one is taken.

    Args:
        schedule: name of a built-in one, such as "1f1b"; under "interleaved" and "v-shape" every device
            gets several runs.
    """

    schedule: str = Field(default="1f1b", pattern=SCHEDULE_PATTERN)

    def plan(
        self, profile: Profile, devices: Sequence[Device], links: Links, *, num_microbatches: int
    ) -> Plan:
        """Cut into as many stages as there are devices.

        Args:
            profile, devices, links, num_microbatches: as in `Partitioner.plan`.

        Raises:
            PlanError: there are more devices than layers or than places to cut.
            InfeasibleError: a stage does not fit its device.
        """
        check_devices(devices)
        costs = cost_model(profile, num_microbatches)
        stages_on = list(devices)
        if placed_schedule_by_name(self.schedule) is None:
            bound_s = step_bound_s(costs, devices, links, self.schedule)
        else:
            stages_on = [devices[d] for d in place(self.schedule, len(devices), num_microbatches).device_of]
            bound_s = step_bound_placed_s(costs, devices)
        return build_plan(
            profile,
            stages_on,
            _even_cuts(costs.positions(), len(stages_on)),
            links,
            num_microbatches=num_microbatches,
            schedule=self.schedule,
            partitioner="uniform",
            bound_s=bound_s,
        )


def _even_cuts(positions: Sequence[int], num_stages: int) -> list[int]:
    """The allowed cuts nearest to equal parts, from the left, leaving enough for the rest."""
    num_layers, num_units = positions[-1], len(positions) - 1
    if num_stages > num_layers:
        raise PlanError(f"{num_stages} stages asked for, but the model has only {num_layers} layers")
    if num_stages > num_units:
        raise PlanError(
            f"{num_stages} stages asked for, but the model can be cut into {num_units} pieces at most"
        )
    cuts: list[int] = []
    first = 1
    for stage in range(1, num_stages):
        wanted = stage * num_layers / num_stages
        allowed = range(first, num_units - (num_stages - stage) + 1)
        unit = min(allowed, key=lambda index: abs(positions[index] - wanted))
        cuts.append(positions[unit])
        first = unit + 1
    return cuts
