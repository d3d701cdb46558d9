"""One door to the searches: the best choice of a space, and the plan that a choice stands for."""

from __future__ import annotations

import numpy as np

from fedmp.errors import InfeasibleError
from fedmp.partition.bound import step_bound_s
from fedmp.partition.build import build_plan
from fedmp.partition.gpipe import search_gpipe
from fedmp.partition.onefoneb import search_1f1b
from fedmp.partition.problem import Problem
from fedmp.partition.space import Choice, Found, Space
from fedmp.records import Plan
from fedmp.topology import Device

__all__ = ["PLACED_PATTERN", "SCHEDULE_PATTERN", "plan_of", "search"]

PLACED_PATTERN = "interleaved(-[1-9][0-9]*)?|v-shape|v-shape-whole"
SCHEDULE_PATTERN = f"^(gpipe|1f1b|1f1b-short|zero-bubble|{PLACED_PATTERN})$"

_USUAL_UNITS = 150  # an expansion takes longer for longer models, so there are fewer
_SWEEP_CELLS = 800_000_000  # cells of all sweeps of one search, about 4 s


def search(space: Space, *, max_expansions: int, limit_s: float = np.inf) -> Found:
    """Find the choice of a space with the least predicted step time.

    Args:
        space: what may be chosen.
        max_expansions: how much to try: extensions of partial choices for 1F1B; for GPipe, sweeps count
            as ten. Reaching it leaves a gap between `step_s` and `bound_s` and is no error.
        limit_s: only choices faster than this are wanted.
    """
    if space.schedule == "gpipe":
        affordable = _SWEEP_CELLS // space.num_cells
        return search_gpipe(space, max_sweeps=max(4, min(max_expansions // 10, affordable)), limit_s=limit_s)
    affordable = max_expansions * _USUAL_UNITS // max(_USUAL_UNITS, space.problem.num_units)
    return search_1f1b(space, max_expansions=max(1, affordable), limit_s=limit_s)


def plan_of(problem: Problem, found: Found, partitioner: str, *, is_global: bool) -> Plan:
    """The plan that a search found.

    Args:
        problem: that was searched.
        found: with a choice.
        partitioner: name of who searched.
        is_global: whether `found.bound_s` holds for every plan, not only for those that were searched.

    Raises:
        InfeasibleError: the search found no choice.
    """
    if found.choice is None:
        raise InfeasibleError("no plan fits the devices' memory")
    costs, devices = problem.costs, devices_of(problem, found.choice)
    bound_s = step_bound_s(costs, problem.devices, problem.links, found.schedule)
    used = {device.name for device in devices}
    return build_plan(
        costs.profile,
        devices,
        [problem.positions[edge] for edge in found.choice.edges[1:-1]],
        problem.links,
        num_microbatches=costs.num_microbatches,
        schedule=found.schedule,
        partitioner=partitioner,
        bound_s=max(bound_s, found.bound_s) if is_global else bound_s,
        unused_devices=[device.name for device in problem.devices if device.name not in used],
    )


def devices_of(problem: Problem, choice: Choice) -> list[Device]:
    """A device for each stage: of its kind, in the order given."""
    unused = [list(kind) for kind in problem.kinds]
    return [problem.devices[unused[kind].pop(0)] for kind in choice.kinds]
