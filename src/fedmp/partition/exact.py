"""The best plan: cuts, devices, their order and the warm-up depth, chosen together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from fedmp.component import Component
from fedmp.partition.build import check_devices
from fedmp.partition.estimate import cost_model
from fedmp.partition.lattice import Lattice, any_order, count_any_order
from fedmp.partition.problem import Problem, make_problem
from fedmp.partition.remedy import infeasible
from fedmp.partition.search import SCHEDULE_PATTERN, plan_of, search
from fedmp.partition.space import Found, Space
from fedmp.records import Plan, Profile
from fedmp.topology import Device, Links

__all__ = ["Exact"]


class Exact(Component):
    schedule: str = Field(default="1f1b", pattern=SCHEDULE_PATTERN)
    max_expansions: int = Field(default=3000, ge=1)
    max_cells: int = Field(default=40_000_000, ge=1)

    def plan(
        self, profile: Profile, devices: Sequence[Device], links: Links, *, num_microbatches: int
    ) -> Plan:
        check_devices(devices)
        costs = cost_model(profile, num_microbatches)
        problem = make_problem(costs, devices, links)
        counts = [len(kind) for kind in problem.kinds]
        lattice = any_order(counts, problem.num_units)
        found = self._best(problem, lattice)
        if found.choice is None:
            raise infeasible(costs, devices, self._schedules[-1], in_order=False)
        return plan_of(problem, found, "exact", is_global=True)

    @property
    def _schedules(self) -> tuple[str, ...]:
        return ("1f1b", "1f1b-short") if self.schedule == "1f1b" else (self.schedule,)

    def _best(self, problem: Problem, lattice: Lattice) -> Found:
        """Under any of the schedules that are allowed."""
        best = Found(None, self.schedule, np.inf, np.inf)
        for schedule in self._schedules:
            space = Space(problem, lattice, schedule)
            found = search(space, max_expansions=self.max_expansions, limit_s=best.step_s)
            bound_s = min(best.bound_s, found.bound_s)
            best = found if found.choice else best
            best = Found(best.choice, best.schedule, best.step_s, bound_s)
        return best
