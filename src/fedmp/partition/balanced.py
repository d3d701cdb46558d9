"""The fast partitioner: balance the stages over the devices in the order given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from fedmp.component import Component
from fedmp.partition.build import check_devices
from fedmp.partition.coarse import coarse_positions
from fedmp.partition.estimate import cost_model
from fedmp.partition.lattice import fixed_order
from fedmp.partition.placed import is_placed, plan_placed, some_orders
from fedmp.partition.problem import make_problem
from fedmp.partition.remedy import infeasible
from fedmp.partition.rules import check_rules
from fedmp.partition.search import SCHEDULE_PATTERN, plan_of, search
from fedmp.partition.space import Space, told_apart
from fedmp.records import Plan, Profile
from fedmp.topology import Device, Links

__all__ = ["Balanced"]

_MAX_CELLS = 40_000_000  # of one dynamic program, less than a second


class Balanced(Component):
    """The best cuts for devices in the order given; a device may be left out, never moved.

    A dynamic program over cuts for a fixed device order, as PipeDream (Narayanan et al., 2019, section
    3.1) and most planners after it have it, with memory as a hard limit. We differ in the objective: not
    the slowest stage but the whole step, GPipe's closed form, or the lower bound of 1F1B and then the
    event simulator for the choices with the least bounds. The order is what `Exact` adds.

    Args:
        schedule: "gpipe", "1f1b" or "1f1b-short"; "zero-bubble", "interleaved" or "v-shape", for which see `placed.py`.
        max_expansions: how many partial choices to look into beyond the dynamic program.
    """

    schedule: str = Field(default="1f1b", pattern=SCHEDULE_PATTERN)
    max_expansions: int = Field(default=200, ge=1)

    def plan(
        self, profile: Profile, devices: Sequence[Device], links: Links, *, num_microbatches: int
    ) -> Plan:
        """Choose the cuts, and which devices to leave out.

        Args:
            profile, devices, links, num_microbatches: as in `Partitioner.plan`.

        Returns:
            The plan. Its `bound_s` holds for any order of the devices and needs no search, so its gap is
            mostly the bound's looseness.

        Raises:
            PlanError: there is no device, two have one name, or forced cuts and pinned layers cannot be kept.
            InfeasibleError: nothing fits in this order; says what would.
        """
        check_devices(devices)
        check_rules(profile, devices, self.schedule)
        costs = cost_model(profile, num_microbatches)
        if is_placed(self.schedule):
            orders, _ = some_orders(devices, in_order=True)
            return plan_placed(
                costs,
                devices,
                links,
                self.schedule,
                orders=orders,
                is_every_order=False,
                partitioner="balanced",
            )
        lattice = fixed_order(range(len(devices)), told_apart(self.schedule, num_microbatches))
        few = coarse_positions(costs, math.isqrt(_MAX_CELLS // lattice.num_states))
        for positions in (few, costs.positions()):
            problem = make_problem(costs, devices, links, positions=positions, merge_devices=False)
            found = search(Space(problem, lattice, self.schedule), max_expansions=self.max_expansions)
            if found.choice is not None:
                return plan_of(problem, found, "balanced", is_global=False)
        raise infeasible(costs, devices, self.schedule, in_order=True)
