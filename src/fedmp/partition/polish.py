"""Shift the cuts of a choice while that makes its step faster, by the event simulator."""

from __future__ import annotations

import itertools

import numpy as np

from fedmp.partition.estimate import Array
from fedmp.partition.events import StageTimes, step_s
from fedmp.partition.lattice import IntArray
from fedmp.partition.space import Choice, Space

__all__ = ["polish"]

_SHIFTS = (-4, -2, -1, 1, 2, 4)


def polish(space: Space, choice: Choice, seconds: float, *, max_turns: int) -> tuple[Choice, float]:
    """Move one cut at a time to where the step is fastest, all candidates of a turn simulated together.

    Args:
        space: what may be chosen; the devices stay as they are.
        choice: to start from.
        seconds: its step time.
        max_turns: moves at most.

    Returns:
        The last choice and its step time.
    """
    kinds = np.asarray(choice.kinds)
    behind = np.arange(len(kinds), 0, -1)
    in_flight = [space.in_flight(int(stages)) for stages in behind]
    for _ in range(max_turns):
        edges = _shifted(choice.edges)
        edges = edges[_fits(space, edges, kinds.tolist(), in_flight)]
        if not len(edges):
            break
        found = step_s(_times(space, edges, choice.kinds), space.schedule, space.num_microbatches)
        best = int(np.argmin(found))
        if not found[best] < seconds * (1 - 1e-9):
            break
        choice, seconds = Choice(tuple(edges[best].tolist()), choice.kinds), float(found[best])
    return choice, seconds


def _shifted(edges: tuple[int, ...]) -> IntArray:
    """Every choice of edges with one cut shifted, stages not empty."""
    rows = []
    for cut in range(1, len(edges) - 1):
        for shift in _SHIFTS:
            if edges[cut - 1] < edges[cut] + shift < edges[cut + 1]:
                rows.append([*edges[:cut], edges[cut] + shift, *edges[cut + 1 :]])
    return np.asarray(rows, dtype=np.int64).reshape(-1, len(edges))


def _fits(space: Space, edges: IntArray, kinds: list[int], in_flight: list[int]) -> IntArray:
    fits = np.ones(len(edges), dtype=bool)
    for stage, (kind, held) in enumerate(zip(kinds, in_flight, strict=True)):
        fits &= space.problem.fits(kind, held)[edges[:, stage], edges[:, stage + 1]]
    return np.flatnonzero(fits)


def _times(space: Space, edges: IntArray, kinds: tuple[int, ...]) -> StageTimes[Array]:
    problem = space.problem
    pairs = list(itertools.pairwise(kinds))
    return StageTimes(
        forward_s=[problem.forward_s(kind)[edges[:, at], edges[:, at + 1]] for at, kind in enumerate(kinds)],
        backward_s=[
            problem.backward_s(kind)[edges[:, at], edges[:, at + 1]] for at, kind in enumerate(kinds)
        ],
        send_s=[problem.send_s[pair][edges[:, at + 1]] for at, pair in enumerate(pairs)],
        gradient_s=[problem.gradient_s[pair][edges[:, at + 1]] for at, pair in enumerate(pairs)],
    )
