"""The best plan: cuts, devices, their order and the warm-up depth, chosen together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from fedmp.component import Component
from fedmp.partition.build import check_devices
from fedmp.partition.coarse import coarse_positions
from fedmp.partition.estimate import CostModel, cost_model
from fedmp.partition.lattice import any_order, count_any_order
from fedmp.partition.neighbourhood import search_few_orders, search_nearby
from fedmp.partition.placed import is_placed, plan_placed, some_orders
from fedmp.partition.problem import Problem, make_problem
from fedmp.partition.remedy import infeasible
from fedmp.partition.rules import check_rules
from fedmp.partition.search import SCHEDULE_PATTERN, plan_of, search
from fedmp.partition.space import Found, Space, told_apart
from fedmp.partition.window import window_lattice
from fedmp.records import Plan, Profile
from fedmp.topology import Device, Links

__all__ = ["Exact"]

_FEW_POSITIONS = 101  # for a neighbourhood search, at most
_LEAST_POSITIONS = 33  # fewer are not worth an exact search


class Exact(Component):
    """The plan with the least predicted step time, of all plans.

    Chooses the number of stages, the cuts, which device takes which stage in which order, which devices
    stay out and, under "1f1b", the warm-up depth (the plan's schedule is then "1f1b" or "1f1b-short").
    Memory is a hard limit. The search is a dynamic program over (layer, multiset of devices that run the
    rest, first of them), which DAPPLE (Fan et al., 2021) and Piper (Tarnawski et al., 2021) have for equal
    devices, inside a branch and bound over GPipe's slowest stage (`gpipe.py`) or over 1F1B's lower bound
    and the event simulator (`onefoneb.py`).

    What is guaranteed: `plan.bound_s` is a lower bound on the step time of every plan, so `plan.gap` is how
    far from optimal the plan can be at most, and a gap of 0 is a proof. Under GPipe that is the rule for 8
    different devices, or more of a few kinds, and 50 layers. Under 1F1B it is the rule for 20 layers and 8
    different devices; beyond, `max_expansions` may end the search with a gap of a percent or two, more
    where links take longer than stages. Where even one dynamic program would be larger than `max_cells`,
    cuts are taken from fewer places, or a neighbourhood search (`neighbourhood.py`) replaces the exact
    one: the plan is good, but the bound is then that of `bound.py`, and loose.

    Under "interleaved" and "v-shape" every choice is tried where there are few: four devices or fewer, and
    so few places to cut that they can be chosen in 20,000 ways. Else the search is local (`placed.py`), and
    `plan.gap` is loose.

    Args:
        schedule: "gpipe", "1f1b", "1f1b-short", "interleaved" or "v-shape".
        max_expansions: partial choices to extend at most, for each schedule, before the proof is given up.
        max_cells: lattice states times pairs of places to cut, in one dynamic program.
    """

    schedule: str = Field(default="1f1b", pattern=SCHEDULE_PATTERN)
    max_expansions: int = Field(default=3000, ge=1)
    max_cells: int = Field(default=20_000_000, ge=1)

    def plan(
        self, profile: Profile, devices: Sequence[Device], links: Links, *, num_microbatches: int
    ) -> Plan:
        """Choose everything.

        Args:
            profile, devices, links, num_microbatches: as in `Partitioner.plan`.

        Returns:
            The plan; `gap` says how far from the optimum it can be.

        Raises:
            PlanError: there is no device, two have one name, or forced cuts and pinned layers cannot be kept.
            InfeasibleError: nothing fits; says the least extra memory, or how many more devices, would.
        """
        check_devices(devices)
        check_rules(profile, devices, self.schedule)
        costs = cost_model(profile, num_microbatches)
        if is_placed(self.schedule):
            orders, is_every_order = some_orders(devices, in_order=False)
            return plan_placed(
                costs,
                devices,
                links,
                self.schedule,
                orders=orders,
                is_every_order=is_every_order,
                partitioner="exact",
            )
        problem = make_problem(costs, devices, links)
        num_states = int(count_any_order([len(kind) for kind in problem.kinds])[-1])
        num_positions = math.isqrt(self.max_cells // num_states)
        if len(problem.positions) <= num_positions:
            found = self._search_all(problem)
        else:
            problem, found = self._search_some(costs, problem, num_positions)
        if found.choice is None:
            raise infeasible(costs, devices, self._schedules[-1], in_order=False)
        return plan_of(problem, found, "exact", is_global=True)

    @property
    def _schedules(self) -> tuple[str, ...]:
        return ("1f1b", "1f1b-short") if self.schedule == "1f1b" else (self.schedule,)

    def _search_all(self, problem: Problem) -> Found:
        """The best choice under any of the schedules, with a bound for all of them."""
        lattice = any_order([len(kind) for kind in problem.kinds], problem.num_units)
        best = replace(search_few_orders(problem, self.schedule), bound_s=np.inf)
        for schedule in self._schedules:
            space = Space(problem, lattice, schedule)
            found = search(space, max_expansions=self.max_expansions, limit_s=best.step_s)
            best = _better(best, found, bound_s=min(best.bound_s, found.bound_s))
        return best

    def _search_some(self, costs: CostModel, problem: Problem, num_positions: int) -> tuple[Problem, Found]:
        """A good choice of a problem too large to search, without a bound; and the problem it is for."""
        few = max(_FEW_POSITIONS, num_positions)
        for positions in (coarse_positions(costs, few), problem.positions):
            coarse = make_problem(costs, problem.devices, problem.links, positions=positions)
            if _LEAST_POSITIONS <= len(positions) <= num_positions:
                found = self._search_all(coarse)
            else:
                found = self._search_nearby(coarse)
            if found.choice is not None:
                return self._refined(coarse, problem, found)
        return problem, found

    def _search_nearby(self, problem: Problem) -> Found:
        """With the first of the schedules under which anything is found to fit."""
        for schedule in self._schedules:
            found = search_nearby(problem, schedule, max_turns=self.max_expansions // 125)
            if found.choice is not None:
                break
        return found

    def _refined(self, coarse: Problem, problem: Problem, found: Found) -> tuple[Problem, Found]:
        """The same devices in the same order, cut at any place."""
        assert found.choice is not None
        apart = told_apart(found.schedule, problem.costs.num_microbatches)
        lattice = window_lattice(found.choice.kinds, slice(0, 0), [], apart)
        space = Space(problem, lattice, found.schedule)
        finer = search(space, max_expansions=self.max_expansions // 10, limit_s=found.step_s)
        chosen, where = (finer, problem) if finer.choice else (found, coarse)
        return where, _better(found, chosen, bound_s=0.0)


def _better(best: Found, found: Found, *, bound_s: float) -> Found:
    chosen = found if found.choice else best
    return Found(chosen.choice, chosen.schedule, chosen.step_s, bound_s)
