"""The control: equally many layers to every device, in the order given, whatever they cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from fedmp.component import Component
from fedmp.errors import PlanError
from fedmp.partition.bound import step_bound_s
from fedmp.partition.build import build_plan, check_devices
from fedmp.partition.estimate import CostModel, cost_model
from fedmp.partition.placed import is_placed, step_bound_placed_s
from fedmp.partition.placed_events import place
from fedmp.partition.rules import check_rules
from fedmp.partition.search import SCHEDULE_PATTERN
from fedmp.records import Plan, Profile
from fedmp.topology import Device, Links

__all__ = ["Uniform"]


class Uniform(Component):
    """Cut into equal numbers of layers, one run for every device, in the order given.

    Where a cut is forbidden or forced, or layers are pinned to a device, the cuts are as near to equal
    parts as that allows.

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
            PlanError: there are more devices than layers or than places to cut, or forced cuts and pinned
                layers cannot be kept with the devices in this order.
            InfeasibleError: a stage does not fit its device.
        """
        check_devices(devices)
        check_rules(profile, devices, self.schedule)
        costs = cost_model(profile, num_microbatches)
        stages_on = list(devices)
        if not is_placed(self.schedule):
            bound_s = step_bound_s(costs, devices, links, self.schedule)
        else:
            stages_on = [devices[d] for d in place(self.schedule, len(devices), num_microbatches).device_of]
            bound_s = step_bound_placed_s(costs, devices)
        return build_plan(
            profile,
            stages_on,
            _even_cuts(costs, stages_on),
            links,
            num_microbatches=num_microbatches,
            schedule=self.schedule,
            partitioner="uniform",
            bound_s=bound_s,
        )


def _even_cuts(costs: CostModel, devices: Sequence[Device]) -> list[int]:
    """The allowed cuts with the least sum of distances to those into equal parts."""
    positions = costs.positions()
    num_stages, num_units = len(devices), len(positions) - 1
    if num_stages > costs.num_layers:
        raise PlanError(f"{num_stages} stages asked for, but the model has only {costs.num_layers} layers")
    if num_stages > num_units:
        raise PlanError(
            f"{num_stages} stages asked for, but the model can be cut into {num_units} pieces at most"
        )
    edges = np.asarray(positions)
    starts, stops = np.meshgrid(edges, edges, indexing="ij")
    distance = np.where(edges == 0, 0.0, np.inf)  # of all cuts so far, by the last one
    cut_before = []
    for stage, device in enumerate(devices, start=1):
        is_stage = (starts < stops) & (costs.num_broken(starts, stops, device) == 0)
        reached = np.where(is_stage, distance[:, None], np.inf)
        cut_before.append(reached.argmin(axis=0))
        distance = reached.min(axis=0) + np.abs(edges - stage * costs.num_layers / num_stages)
    if not np.isfinite(distance[-1]):
        order = ", ".join(device.name for device in devices)
        raise PlanError(
            f"no cuts into {num_stages} stages for {order}, in this order, keep the forced cuts and pinned layers; "
            f"change the order or the rules, or use the partitioner 'exact'"
        )
    cuts, unit = [], num_units
    for chosen in cut_before[:0:-1]:
        unit = int(chosen[unit])
        cuts.append(positions[unit])
    return cuts[::-1]
