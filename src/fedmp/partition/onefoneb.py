"""The optimal choice under 1F1B, by branch and bound with the event simulator.

A 1F1B step has no closed form once stages differ and links take time. `least_bounds` gives a lower bound
that is also a perfect guide: from any state, the least bound of all ways to go on. So choices are built
stage by stage from the front, always extending the one whose bound is least (A*, Hart et al., 1968),
complete ones are simulated, and the search ends when no bound is below the best simulated step.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedmp.partition.estimate import Array
from fedmp.partition.events import step_s
from fedmp.partition.problem import BoolArray
from fedmp.partition.space import Choice, Found, Space
from fedmp.partition.sweep import Bounds, least_bounds, span_s

__all__ = ["search_1f1b"]


class _Stage(NamedTuple):
    """A stage that is decided: its times, its depth, and the seconds before it."""

    forward_s: float
    backward_s: float
    depth: int
    before_s: float


class _Node(NamedTuple):
    """Decided stages, and the state and unit that the next one starts from. Ordered by what comes first."""

    bound_s: float
    total_s: float
    serial: int
    state: int
    edges: tuple[int, ...]
    kinds: tuple[int, ...]
    before_s: float
    decided: tuple[_Stage, ...]


def search_1f1b(space: Space, *, max_expansions: int, limit_s: float = np.inf) -> Found:
    """Find the choice with the least simulated step time.

    Args:
        space: what may be chosen.
        max_expansions: partial choices to extend at most; the bound says how much was left to prove.
        limit_s: only choices faster than this are wanted.
    """
    search = _Search(space)
    nodes = search.roots(limit_s)
    # A dive along the least bounds first: there is an answer, however few expansions are allowed.
    best = _better(space, search.dive(nodes[0]) if nodes else None, None, limit_s)
    for _ in range(max_expansions):
        if not nodes or nodes[0].bound_s >= best.step_s:
            break
        node = heapq.heappop(nodes)
        best = _better(space, search.complete(node), best.choice, best.step_s)
        for child in search.children(node, best.step_s):
            heapq.heappush(nodes, child)
    bound_s = min(best.step_s, nodes[0].bound_s) if nodes else best.step_s
    return replace(best, step_s=best.step_s if best.choice else np.inf, bound_s=bound_s)


def _better(space: Space, tried: Choice | None, best: Choice | None, best_s: float) -> Found:
    """The faster of two choices; `best_s` is the seconds of the best one, or what it must beat."""
    if tried is not None:
        seconds = step_s(space.times(tried), space.schedule, space.num_microbatches)
        if seconds < best_s:
            best, best_s = tried, seconds
    return Found(best, space.schedule, best_s, best_s)


class _Search:
    """The tables of one search, and the two ways to go on from a node: to end, or to cut."""

    def __init__(self, space: Space) -> None:
        problem = space.problem
        self.space = space
        self.bounds: Bounds = least_bounds(space)
        self.links: Array = problem.send_s + problem.gradient_s
        self.others: Array = (space.num_microbatches - 1) * np.maximum(problem.send_s, problem.gradient_s)
        self.times = [
            (problem.forward_s(kind), problem.backward_s(kind)) for kind in range(len(problem.kinds))
        ]
        self.fitting: dict[tuple[int, int], BoolArray] = {}
        self.serial = itertools.count()

    def roots(self, limit_s: float) -> list[_Node]:
        """A heap of the states that a plan may start with."""
        steps, totals, kinds = self.bounds.steps[:, 0], self.bounds.totals[:, 0], self.space.lattice.kinds
        roots = [
            _Node(
                float(steps[s]), float(totals[s]), next(self.serial), int(s), (0,), (int(kinds[s]),), 0.0, ()
            )
            for s in np.flatnonzero(steps < limit_s)
        ]
        heapq.heapify(roots)
        return roots

    def dive(self, node: _Node) -> Choice:
        """A choice that goes on from the node along the least bound."""
        while (complete := self.complete(node)) is None:
            node = min(self.children(node, np.inf))
        return complete

    def complete(self, node: _Node) -> Choice | None:
        """The node's choice with all that is left in its last stage, if it may end there and fits."""
        if not self.space.lattice.may_end[node.state] or not self._fits(node)[-1]:
            return None
        return Choice((*node.edges, self.space.problem.num_units), node.kinds)

    def children(self, node: _Node, best_s: float) -> list[_Node]:
        """All next cuts and devices whose bound is below `best_s`."""
        unit, kind, lattice = node.edges[-1], node.kinds[-1], self.space.lattice
        followers = lattice.successors[node.state]
        followers = followers[followers >= 0]
        kinds, fits, depth = lattice.kinds[followers], self._fits(node), self._depth(node)
        forward_s, backward_s = (np.where(fits, seconds[unit], 0.0) for seconds in self.times[kind])
        until_next_s = np.where(fits, forward_s + backward_s, np.inf) + self.links[kind, kinds]
        way_s = self.links[kind, kinds] + self.bounds.totals[followers]
        totals = until_next_s + self.bounds.totals[followers]
        reachable = np.isfinite(totals)
        span = span_s(
            forward_s, backward_s, np.where(reachable, way_s, 0.0), depth, self.space.num_microbatches
        )
        later = np.maximum(until_next_s + self.bounds.steps[followers], totals + self.others[kind, kinds])
        bounds = np.maximum(node.before_s + np.maximum(span, later), node.bound_s)
        earlier = self._earlier_spans(node, np.where(reachable, node.before_s + totals, 0.0))
        bounds = np.maximum(bounds, earlier)
        children = []
        for row, edge in zip(*np.nonzero(bounds < best_s), strict=True):
            next_s = node.before_s + float(until_next_s[row, edge])
            stage = _Stage(float(forward_s[edge]), float(backward_s[edge]), depth, node.before_s)
            children.append(
                _Node(
                    bound_s=float(bounds[row, edge]),
                    total_s=node.before_s + float(totals[row, edge]),
                    serial=next(self.serial),
                    state=int(followers[row]),
                    edges=(*node.edges, int(edge)),
                    kinds=(*node.kinds, int(kinds[row])),
                    before_s=next_s,
                    decided=(*node.decided, stage),
                )
            )
        return children

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
        key = (node.kinds[-1], self._depth(node))
        if key not in self.fitting:
            self.fitting[key] = self.space.problem.fits(*key)
        fits: BoolArray = self.fitting[key][node.edges[-1]]
        return fits

    def _depth(self, node: _Node) -> int:
        return self.space.in_flight(int(self.space.lattice.behind[node.state]))
