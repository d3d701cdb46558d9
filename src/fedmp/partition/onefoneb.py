"""The optimal choice under 1F1B, by branch and bound with the event simulator.

A 1F1B step has no closed form once stages differ and links take time. `least_bounds` gives a lower bound
that is also a perfect guide: from any state, the least bound of all ways to go on. So choices are built
stage by stage from the front, always extending the one whose bound is least (A*, Hart et al., 1968),
complete ones are simulated, and the search ends when no bound is below the best simulated step.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fedmp.partition.estimate import Array
from fedmp.partition.events import step_s
from fedmp.partition.polish import polish
from fedmp.partition.problem import BoolArray
from fedmp.partition.space import Choice, Found, Space
from fedmp.partition.sweep import Bounds, least_bounds, span_s

__all__ = ["search_1f1b"]

# Best first alone may take long to complete anything: follow every so many-th node to its end at once.
_DIVE_EVERY = 16
_POLISH_TURNS = 8
_PROMISING = 1.03  # times the best step: worth polishing


class _Stage(NamedTuple):
    """A stage that is decided: its times, its depth, and the seconds before it."""

    forward_s: float
    backward_s: float
    depth: int
    before_s: float


class _Node(NamedTuple):
    """Decided stages, and the state and unit that the next one starts from."""

    bound_s: float
    state: int
    edges: tuple[int, ...]
    kinds: tuple[int, ...]
    before_s: float
    decided: tuple[_Stage, ...]


@dataclass(frozen=True)
class _Family:
    """The ways to go on from one node, the most promising first; made into nodes one by one, when needed."""

    bounds: Array
    totals: Array
    child: Callable[[int], _Node]


class _Entry(NamedTuple):
    """A member of a family on the heap. Equal bounds are told apart by the least total, then by age."""

    bound_s: float
    total_s: float
    serial: int
    family: _Family
    member: int


def search_1f1b(space: Space, *, max_expansions: int, limit_s: float = np.inf) -> Found:
    """Find the choice with the least simulated step time.

    Args:
        space: what may be chosen.
        max_expansions: partial choices to extend at most; the bound says how much was left to prove.
        limit_s: only choices faster than this are wanted.
    """
    search = _Search(space, limit_s)
    search.add(search.roots(limit_s))
    best = Found(None, space.schedule, limit_s, limit_s)
    for turn in range(max_expansions):
        if search.bound_s >= best.step_s:
            break
        node = search.pop()
        complete = search.complete(node)
        family = search.children(node, best.step_s)
        search.add(family)
        if complete is None and turn % _DIVE_EVERY == 0 and len(family.bounds):
            complete = search.dive(family.child(0))
        best = _better(space, complete, best)
    return replace(
        best, step_s=best.step_s if best.choice else np.inf, bound_s=min(best.step_s, search.bound_s)
    )


def _better(space: Space, tried: Choice | None, best: Found) -> Found:
    """The faster of the best choice and one that was tried, its cuts shifted to where they are best."""
    if tried is None:
        return best
    seconds = step_s(space.times(tried), space.schedule, space.num_microbatches)
    if seconds < best.step_s * _PROMISING:
        tried, seconds = polish(space, tried, seconds, max_turns=_POLISH_TURNS)
    return replace(best, choice=tried, step_s=seconds) if seconds < best.step_s else best


class _Search:
    """The tables and the heap of one search, and the two ways to go on from a node: to end, or to cut."""

    def __init__(self, space: Space, limit_s: float) -> None:
        problem = space.problem
        self.space = space
        self.bounds: Bounds = least_bounds(space, limit_s)
        self.links: Array = problem.send_s + problem.gradient_s
        self.others: Array = (space.num_microbatches - 1) * np.maximum(problem.send_s, problem.gradient_s)
        self.heap: list[_Entry] = []
        self.serial = itertools.count()

    @property
    def bound_s(self) -> float:
        """No choice that is still to be found is faster."""
        return self.heap[0].bound_s if self.heap else np.inf

    def add(self, family: _Family, index: int = 0) -> None:
        """Put a member of a family on the heap; the next one follows when it is taken off."""
        if index < len(family.bounds):
            bound_s, total_s = float(family.bounds[index]), float(family.totals[index])
            heapq.heappush(self.heap, _Entry(bound_s, total_s, next(self.serial), family, index))

    def pop(self) -> _Node:
        """The most promising node."""
        entry = heapq.heappop(self.heap)
        self.add(entry.family, entry.member + 1)
        return entry.family.child(entry.member)

    def dive(self, node: _Node) -> Choice:
        """A choice from a node on, along the least bounds."""
        while (complete := self.complete(node)) is None:
            node = self.children(node, np.inf).child(0)
        return complete

    def roots(self, limit_s: float) -> _Family:
        """The states that a plan may start with."""
        steps, totals, kinds = self.bounds.steps[:, 0], self.bounds.totals[:, 0], self.space.lattice.kinds
        order = np.lexsort((totals, steps))
        order = order[: int(np.sum(steps < limit_s))]

        def child(index: int) -> _Node:
            state = int(order[index])
            return _Node(float(steps[state]), state, (0,), (int(kinds[state]),), 0.0, ())

        return _Family(steps[order], totals[order], child)

    def complete(self, node: _Node) -> Choice | None:
        """The node's choice with all that is left in its last stage, if it may end there and fits."""
        if not self.space.lattice.may_end[node.state] or not self._fits(node)[-1]:
            return None
        return Choice((*node.edges, self.space.problem.num_units), node.kinds)

    def children(self, node: _Node, best_s: float) -> _Family:
        """All next cuts and devices whose bound is below `best_s`."""
        unit, kind, lattice, problem = node.edges[-1], node.kinds[-1], self.space.lattice, self.space.problem
        followers = lattice.successors[node.state]
        followers = followers[followers >= 0]
        kinds, fits, depth = lattice.kinds[followers], self._fits(node), self._depth(node)
        forward_s = np.where(fits, problem.forward_s(kind)[unit], 0.0)
        backward_s = np.where(fits, problem.backward_s(kind)[unit], 0.0)
        until_next_s = np.where(fits, forward_s + backward_s, np.inf) + self.links[kind, kinds]
        way_s = self.links[kind, kinds] + self.bounds.totals[followers]
        totals = until_next_s + self.bounds.totals[followers]
        reachable = np.isfinite(totals)
        known_s = np.where(reachable, way_s, 0.0)
        span = span_s(forward_s, backward_s, known_s, depth, self.space.num_microbatches)
        later = np.maximum(until_next_s + self.bounds.steps[followers], totals + self.others[kind, kinds])
        bounds = np.maximum(node.before_s + np.maximum(span, later), node.bound_s)
        earlier = self._earlier_spans(node, np.where(reachable, node.before_s + totals, 0.0))
        rows, edges = np.nonzero(np.maximum(bounds, earlier) < best_s)
        bounds, totals = np.maximum(bounds, earlier)[rows, edges], totals[rows, edges]
        order = np.lexsort((totals, bounds))

        def child(index: int) -> _Node:
            row, edge = int(rows[order[index]]), int(edges[order[index]])
            stage = _Stage(float(forward_s[edge]), float(backward_s[edge]), depth, node.before_s)
            return _Node(
                bound_s=float(bounds[order[index]]),
                state=int(followers[row]),
                edges=(*node.edges, edge),
                kinds=(*node.kinds, int(kinds[row])),
                before_s=node.before_s + float(until_next_s[row, edge]),
                decided=(*node.decided, stage),
            )

        return _Family(bounds[order], node.before_s + totals[order], child)

    def _earlier_spans(self, node: _Node, totals: Array) -> Array:
        """Bounds from stages decided earlier, now that more of the way behind them is known."""
        bounds = np.zeros_like(totals)
        for stage in node.decided:
            way_s = np.maximum(totals - stage.before_s - stage.forward_s - stage.backward_s, 0.0)
            span = span_s(stage.forward_s, stage.backward_s, way_s, stage.depth, self.space.num_microbatches)
            bounds = np.maximum(bounds, stage.before_s + span)
        return bounds

    def _fits(self, node: _Node) -> BoolArray:
        """Which end units fit the node's device."""
        fits: BoolArray = self.space.problem.fits(node.kinds[-1], self._depth(node))[node.edges[-1]]
        return fits

    def _depth(self, node: _Node) -> int:
        return self.space.in_flight(int(self.space.lattice.behind[node.state]))
