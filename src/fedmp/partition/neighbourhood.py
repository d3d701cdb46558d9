"""A good choice where there are too many devices to search all: improve a pipeline a window at a time.

Large neighbourhood search (Shaw, 1998): of a pipeline's devices, those of a few neighbouring stages are
freed, with a few unused ones to replace them; the best order and all cuts of the whole pipeline are then
found as in the exact search, since the rest of the lattice is a chain. Windows move along the pipeline
until none improves it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedmp.partition.lattice import Lattice, fixed_order, fixed_order_counted, make_lattice
from fedmp.partition.problem import Problem
from fedmp.partition.search import search
from fedmp.partition.space import Found, Space

__all__ = ["search_nearby", "window_lattice"]

_WINDOW = 3  # stages that are freed at once
_SPARES = 2  # unused devices that are offered to them
_EXPANSIONS = {"gpipe": 100, "1f1b": 30, "1f1b-short": 30}  # of each search
_EXPANSION_CELLS = 8000  # as long as an expansion takes


def search_nearby(problem: Problem, schedule: str, *, max_cells: int) -> Found:
    """Find a good choice, with no claim to the best: `bound_s` is 0.

    Args:
        problem: with any number of devices.
        schedule: "gpipe", "1f1b" or "1f1b-short".
        max_cells: when to stop: about the size of all dynamic programs together.
    """
    best, spent = _best_start(problem, schedule)
    turn = since_better = 0
    while best.choice is not None and since_better < len(best.choice.kinds) and spent < max_cells:
        order = best.choice.kinds
        window, spares = _window(turn, len(order)), _spares(problem, order, turn)
        space = Space(problem, window_lattice(order, window, spares), schedule)
        # Only what is clearly faster counts, so that rounding cannot keep the search going.
        found = search(space, max_expansions=_EXPANSIONS[schedule], limit_s=best.step_s * (1 - 1e-9))
        best, since_better = (found, 0) if found.choice else (best, since_better + 1)
        spent += space.num_cells + _EXPANSIONS[schedule] * _EXPANSION_CELLS
        turn += 1
    return replace(best, bound_s=0.0)


class _Key(NamedTuple):
    """A state of a window's lattice: `behind` comes first, so that sorting puts followers before."""

    behind: int
    kind: int
    part: str
    detail: tuple[int, ...]


def window_lattice(order: Sequence[int], window: slice, spares: Sequence[int]) -> Lattice:
    """A pipeline's devices, those in a window free to change order, to leave, and to be replaced.

    Args:
        order: kinds of the pipeline's stages.
        window: the stages that are free; none, for a pipeline whose cuts alone are free.
        spares: kinds of unused devices that the window may take in, once for each device.
    """
    before, after = list(order[: window.start])[::-1], list(order[window.stop :])[::-1]
    pool = [*order[window], *spares]
    kinds = sorted(set(pool))
    multisets = list(itertools.product(*(range(pool.count(kind) + 1) for kind in kinds)))
    tail = [_Key(place + 1, kind, "after", (place,)) for place, kind in enumerate(after)]
    middle = {used: _heads(used, kinds, len(after)) for used in multisets}
    head = [
        _Key(len(after) + taken + place + 1, kind, "before", (place, taken))
        for taken in range(len(pool) + 1)
        for place, kind in enumerate(before)
    ]

    def followers(key: _Key) -> list[_Key]:
        if key.part == "before" and key.detail[0] > 0:
            place, taken = key.detail
            return [_Key(key.behind - 1, before[place - 1], "before", (place - 1, taken))]
        if key.part == "before" and key.detail[1] > 0:
            return [
                state for used, states in middle.items() if sum(used) == key.detail[1] for state in states
            ]
        if key.part == "window" and sum(key.detail) > 1:
            own = kinds.index(key.kind)
            return middle[(*key.detail[:own], key.detail[own] - 1, *key.detail[own + 1 :])]
        place = key.detail[0] if key.part == "after" else len(after)
        return tail[place - 1 : place] if place > 0 else []

    keys = sorted([*tail, *itertools.chain.from_iterable(middle.values()), *head])
    return make_lattice(keys, kind=lambda key: key.kind, behind=lambda key: key.behind, followers=followers)


def _heads(used: tuple[int, ...], kinds: Sequence[int], num_after: int) -> list[_Key]:
    """The states of a multiset of the window's devices: one for each kind that may come first."""
    return [
        _Key(num_after + sum(used), kind, "window", used)
        for kind, count in zip(kinds, used, strict=True)
        if count > 0
    ]


def _best_start(problem: Problem, schedule: str) -> tuple[Found, int]:
    """The best choice among a few fixed orders of all devices, and the cells it took."""
    best, spent = Found(None, schedule, np.inf, 0.0), 0
    places = [kind for kind, members in enumerate(problem.kinds) for _ in members]
    fastest = sorted(places, key=lambda kind: -problem.device_of(kind).flops_per_s)
    largest = sorted(fastest, key=lambda kind: -problem.device_of(kind).memory_bytes)
    for order in (fastest, largest):
        max_stages = problem.num_units
        lattice = fixed_order(order) if schedule == "gpipe" else fixed_order_counted(order, max_stages)
        space = Space(problem, lattice, schedule)
        found = search(space, max_expansions=_EXPANSIONS[schedule], limit_s=best.step_s)
        best = found if found.choice else best
        spent += space.num_cells
    return best, spent


def _window(turn: int, num_stages: int) -> slice:
    """Windows that overlap by one stage, over and over."""
    starts = range(0, max(1, num_stages - _WINDOW + 1), _WINDOW - 1)
    start = starts[turn % len(starts)]
    return slice(start, start + _WINDOW)


def _spares(problem: Problem, order: Sequence[int], turn: int) -> list[int]:
    """Unused devices, the fastest first and then, turn by turn, others."""
    unused = [
        kind
        for kind, members in enumerate(problem.kinds)
        for _ in range(min(_SPARES, len(members) - list(order).count(kind)))
    ]
    unused.sort(key=lambda kind: -problem.device_of(kind).flops_per_s)
    start = turn * _SPARES // max(1, len(order) // 2) % max(1, len(unused))
    return (unused[start:] + unused[:start])[:_SPARES]
