"""A good choice where there are too many devices to search all: improve a pipeline a window at a time.

Large neighbourhood search (Shaw, 1998): of a pipeline's devices, those of a few neighbouring stages are
freed, with a few unused ones to replace them; the best order and all cuts of the whole pipeline are then
found as in the exact search, since the rest of the lattice is a chain. Windows move along the pipeline
until none improves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedmp.partition.lattice import any_order, count_any_order, fixed_order
from fedmp.partition.problem import Problem
from fedmp.partition.search import search
from fedmp.partition.space import Found, Space, told_apart
from fedmp.partition.window import window_lattice

__all__ = ["search_few_orders", "search_nearby"]

_WINDOW = 3  # stages that are freed at once
_SPARES = 2  # unused devices that are offered to them
_EXPANSIONS = {"gpipe": 60, "1f1b": 30, "1f1b-short": 30}  # of each window
_START_EXPANSIONS = 200  # of each start: as `Balanced` does, so as not to be worse
_FEW_CELLS = 5_000_000  # of a dynamic program over any order of few devices


def search_few_orders(problem: Problem, schedule: str) -> Found:
    """Find the best choice among a few fixed orders of all devices, any of which may be left out.

    Args:
        problem: with any number of devices.
        schedule: "gpipe", "1f1b" or "1f1b-short".
    """
    best = Found(None, schedule, np.inf, 0.0)
    apart = told_apart(schedule, problem.costs.num_microbatches)
    for order in _orders(problem):
        space = Space(problem, fixed_order(order, apart), schedule)
        found = search(space, max_expansions=_START_EXPANSIONS, limit_s=best.step_s)
        best = found if found.choice else best
    return replace(best, bound_s=0.0)


def search_nearby(problem: Problem, schedule: str, *, max_turns: int) -> Found:
    """Find a good choice, with no claim to the best: `bound_s` is 0.

    Args:
        problem: with any number of devices.
        schedule: "gpipe", "1f1b" or "1f1b-short".
        max_turns: windows to try at most.
    """
    best = _search_few_stages(problem, search_few_orders(problem, schedule))
    apart = told_apart(schedule, problem.costs.num_microbatches)
    since_better = 0
    for turn in range(max_turns):
        if best.choice is None or since_better >= len(best.choice.kinds):
            break
        order = best.choice.kinds
        window, spares = _window(turn, len(order)), _spares(problem, order, turn)
        space = Space(problem, window_lattice(order, window, spares, apart), schedule)
        # Only what is clearly faster counts, so that rounding cannot keep the search going.
        found = search(space, max_expansions=_EXPANSIONS[schedule], limit_s=best.step_s * (1 - 1e-9))
        best, since_better = (found, 0) if found.choice else (best, since_better + 1)
    return replace(best, bound_s=0.0)


def _search_few_stages(problem: Problem, best: Found) -> Found:
    """Any order of so few devices that the search is small; better than nothing where kinds are few."""
    counts = [len(members) for members in problem.kinds]
    affordable = _FEW_CELLS // (problem.num_units + 1) ** 2
    max_stages = int(np.searchsorted(count_any_order(counts), affordable, side="right")) - 1
    if max_stages <= _WINDOW:
        return best
    space = Space(problem, any_order(counts, max_stages), best.schedule)
    found = search(space, max_expansions=_EXPANSIONS[best.schedule], limit_s=best.step_s)
    return found if found.choice else best


def _orders(problem: Problem) -> list[tuple[int, ...]]:
    """All devices' kinds: as given, the fastest first, the largest first."""
    kind_of = {device: kind for kind, members in enumerate(problem.kinds) for device in members}
    given = [kind_of[index] for index in range(len(problem.devices))]
    fastest = sorted(given, key=lambda kind: -problem.device_of(kind).flops_per_s)
    largest = sorted(fastest, key=lambda kind: -problem.device_of(kind).memory_bytes)
    return list(dict.fromkeys(_among_pinned(problem, order) for order in (given, fastest, largest)))


def _among_pinned(problem: Problem, order: Sequence[int]) -> tuple[int, ...]:
    """The same kinds, those that layers are pinned to where their layers are in the model."""
    layers = problem.costs.profile.layers
    places: dict[int, float] = {}
    for kind in order:
        name = problem.device_of(kind).name
        own = [index for index, layer in enumerate(layers) if layer.device == name]
        if own:
            places[kind] = (own[0] + own[-1] + 1) / 2 / len(layers)
    free = [kind for kind in order if kind not in places]
    placed = [((index + 0.5) / len(free), kind) for index, kind in enumerate(free)]
    placed += [(place, kind) for kind, place in places.items()]
    return tuple(kind for _, kind in sorted(placed, key=lambda entry: entry[0]))


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
