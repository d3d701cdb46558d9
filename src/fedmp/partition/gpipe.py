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
from fedmp.partition.events import StageTimes, gpipe_step_s
from fedmp.partition.space import Choice, Found, Space
from fedmp.partition.sweep import Caps, least_totals

__all__ = ["search_gpipe"]

_LADDER = (1.05, 1.15, 1.3, 1.5, 1.8, 2.3, 3.0, 4.5, 7.0)


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
    search = _Search(space, limit_s)
    low = _least_possible(space)
    if np.isinf(limit_s):
        search.climb(low, max_sweeps // 2)
    boxes = [_Box(0.0, 0, low, (np.inf, np.inf), 0.0, False)]
    while boxes and boxes[0].bound_s < search.best_s and search.num_sweeps < max_sweeps:
        for part in search.divide(heapq.heappop(boxes)):
            heapq.heappush(boxes, part)
    bound_s = min(search.best_s, boxes[0].bound_s) if boxes else search.best_s
    return Found(search.choice, space.schedule, search.best_s if search.choice else np.inf, bound_s)


class _Search:
    """The best choice so far, and how a box is made smaller."""

    def __init__(self, space: Space, limit_s: float) -> None:
        self.space = space
        self.others = space.num_microbatches - 1
        self.choice: Choice | None = None
        self.best_s = limit_s
        self.num_sweeps = 0
        self.serial = itertools.count(1)

    def climb(self, low: tuple[float, float], max_sweeps: int) -> None:
        """Try caps from the least possible ones up, for a good choice to begin with."""
        for times in _LADDER[:max_sweeps]:
            self.solve((low[0] * times, low[1] * times))

    def solve(self, high: tuple[float, float]) -> StageTimes[float] | None:
        """The choice with the least sum among those that stay below `high`; note it if it is the best."""
        self.num_sweeps += 1
        choice = _least_total_choice(self.space, Caps(*(float(np.nextafter(cap, 0.0)) for cap in high)))
        if choice is None:
            return None
        times = self.space.times(choice)
        seconds = gpipe_step_s(times, self.space.num_microbatches)
        if seconds < self.best_s:
            self.choice, self.best_s = choice, seconds
        return times

    def divide(self, box: _Box) -> list[_Box]:
        """What of a box may hold something better, in parts."""
        box = self._clip(box)
        if box.solved:
            parts = _halves(box)
        else:
            times = self.solve(box.high)
            parts = _below(box, times) if times else []
        bounded = [part._replace(bound_s=max(box.bound_s, self._bound_s(part))) for part in parts]
        return [part._replace(serial=next(self.serial)) for part in bounded if part.bound_s < self.best_s]

    def _clip(self, box: _Box) -> _Box:
        """Leave out what is slower than the best choice by its caps alone."""
        if self.others == 0 or np.isinf(self.best_s):
            return box
        slack = (self.best_s - box.total_s) / self.others
        forward = max(box.low[0], min(box.high[0], slack - box.low[1]))
        backward = max(box.low[1], min(box.high[1], slack - box.low[0]))
        return box._replace(high=(forward, backward))

    def _bound_s(self, box: _Box) -> float:
        return box.total_s + self.others * (box.low[0] + box.low[1])


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


def _below(box: _Box, times: StageTimes[float]) -> list[_Box]:
    """What is left of a box once its upper corner is solved.

    The solution beats every choice that is nowhere faster than its slowest stages, since its sum is the
    least of all.
    """
    forward, backward = [*times.forward_s, *times.send_s], [*times.backward_s, *times.gradient_s]
    box = box._replace(total_s=sum(forward) + sum(backward), solved=True)
    left = [
        box._replace(high=(max(forward), box.high[1])),
        box._replace(low=(max(box.low[0], max(forward)), box.low[1]), high=(box.high[0], max(backward))),
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
