"""The optimal choice under GPipe, by branch and bound over the slowest stage or link.

GPipe's closed form is a sum over stages and links, plus M - 1 times the slowest forward and the slowest
backward. Under caps on those two the sum alone is left, a dynamic program (`least_totals`). Alpa (Zheng et
al., 2022, section 5.2) tries the caps one by one; here boxes of caps are bounded, solved at their upper
corner and split, so that most caps are never tried, and forward and backward have a cap each.
"""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple

import numpy as np

from fedmp.partition.estimate import Array
from fedmp.partition.events import gpipe_step_s
from fedmp.partition.space import Choice, Found, Space
from fedmp.partition.sweep import Caps, least_totals

__all__ = ["search_gpipe"]


class _Box(NamedTuple):
    """Choices whose slowest forward and backward are at least `low` and less than `high`.

    `total_s` is a lower bound on their sum over stages and links; `solved` tells whether it was computed
    for the box's own upper corner.
    """

    bound_s: float
    serial: int
    low: tuple[float, float]
    high: tuple[float, float]
    total_s: float
    solved: bool


def search_gpipe(space: Space, *, max_sweeps: int, limit_s: float = np.inf) -> Found:
    """Find the choice with the least step time.

    Args:
        space: what may be chosen.
        max_sweeps: dynamic programs at most; the bound says how much was left to prove.
        limit_s: only choices faster than this are wanted.
    """
    choice, best_s, sweeps = None, limit_s, 0
    serial = itertools.count()
    boxes = [_Box(0.0, next(serial), _least_possible(space), (np.inf, np.inf), 0.0, False)]
    while boxes and boxes[0].bound_s < best_s and sweeps < max_sweeps:
        box = heapq.heappop(boxes)
        if box.solved:
            children = _halves(box)
        else:
            sweeps += 1
            caps = Caps(*(float(np.nextafter(high, 0.0)) for high in box.high))
            found = _least_total_choice(space, caps)
            if found is None:
                continue
            times = space.times(found)
            seconds = gpipe_step_s(times, space.num_microbatches)
            if seconds < best_s:
                choice, best_s = found, seconds
            slowest = max([*times.forward_s, *times.send_s]), max([*times.backward_s, *times.gradient_s])
            total_s = seconds - (space.num_microbatches - 1) * sum(slowest)
            children = _below(box, slowest, total_s)
        for child in children:
            bound_s = child.total_s + (space.num_microbatches - 1) * sum(child.low)
            if max(bound_s, box.bound_s) < best_s:
                heapq.heappush(boxes, child._replace(bound_s=max(bound_s, box.bound_s), serial=next(serial)))
    bound_s = min(best_s, boxes[0].bound_s) if boxes else best_s
    return Found(choice, space.schedule, best_s if choice else np.inf, bound_s)


def _least_possible(space: Space) -> tuple[float, float]:
    """No stage is slower than these if all devices share the work perfectly; a lower corner for all boxes."""
    kinds = range(len(space.problem.kinds))
    speeds = [len(space.problem.kinds[kind]) for kind in kinds]
    whole = [(space.problem.forward_s(kind)[0, -1], space.problem.backward_s(kind)[0, -1]) for kind in kinds]
    # A device that takes `t` seconds for the whole model does 1/t of it in a second.
    forward, backward = (
        sum(
            count / seconds[way] if seconds[way] > 0 else np.inf
            for count, seconds in zip(speeds, whole, strict=True)
        )
        for way in (0, 1)
    )
    return (1 - 1e-9) / forward, (1 - 1e-9) / backward


def _below(box: _Box, slowest: tuple[float, float], total_s: float) -> list[_Box]:
    """What is left of a box once its upper corner is solved.

    The solution beats every choice that is nowhere faster than its slowest stages, since its sum is the
    least of all.
    """
    (low_f, low_b), (high_f, high_b) = box.low, box.high
    left = [
        box._replace(high=(slowest[0], high_b), total_s=total_s, solved=True),
        box._replace(
            low=(max(low_f, slowest[0]), low_b), high=(high_f, slowest[1]), total_s=total_s, solved=True
        ),
    ]
    return [part for part in left if part.low[0] < part.high[0] and part.low[1] < part.high[1]]


def _halves(box: _Box) -> list[_Box]:
    """Split in the wider direction; a box that cannot be split is to be solved."""
    widths = [high - low for low, high in zip(box.low, box.high, strict=True)]
    way = 0 if widths[0] >= widths[1] else 1
    middle = (box.low[way] + box.high[way]) / 2
    if not box.low[way] < middle < box.high[way]:
        return [box._replace(solved=False)]
    lower = box._replace(high=_put(box.high, way, middle), solved=False)
    return [lower, box._replace(low=_put(box.low, way, middle), solved=False)]


def _put(corner: tuple[float, float], way: int, value: float) -> tuple[float, float]:
    return (value, corner[1]) if way == 0 else (corner[0], value)


def _least_total_choice(space: Space, caps: Caps) -> Choice | None:
    """The choice with the least sum under the caps: follow the sweep from its best state."""
    problem, lattice = space.problem, space.lattice
    totals = least_totals(space, caps)
    state = int(totals[:, 0].argmin())
    if not np.isfinite(totals[state, 0]):
        return None
    links = caps.keep(problem.send_s, problem.gradient_s, problem.send_s + problem.gradient_s)
    edges, kinds = [0], [int(lattice.kinds[state])]
    while True:
        unit, kind = edges[-1], kinds[-1]
        stage_s = _row(space, caps, kind, int(lattice.behind[state]), unit)
        followers = lattice.successors[state]
        rest = totals[followers] + space.over_links(links, state)
        rest[followers < 0] = np.inf
        after = stage_s + rest
        if lattice.may_end[state] and stage_s[-1] <= after.min():
            return Choice((*edges, problem.num_units), tuple(kinds))
        follower, edge = np.unravel_index(after.argmin(), after.shape)
        state = int(followers[follower])
        edges.append(int(edge))
        kinds.append(int(lattice.kinds[state]))


def _row(space: Space, caps: Caps, kind: int, behind: int, unit: int) -> Array:
    forward_s, backward_s = space.problem.forward_s(kind)[unit], space.problem.backward_s(kind)[unit]
    return caps.keep(forward_s, backward_s, space.seconds(kind, behind)[unit])
