"""The dynamic programs: the least that the rest of the model takes, from every state of a search.

A state is a unit to start from and a state of the device lattice. Both programs run from the end of the
model to its start, a group of lattice states at a time as one numpy array, and both are exact relaxations
of a step's time: `least_totals` of the sum in GPipe's closed form under a cap on every stage and link,
`least_bounds` of the time that a 1F1B step takes at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmp.partition.estimate import Array
from fedmp.partition.lattice import IntArray
from fedmp.partition.space import Space

__all__ = ["NO_CAPS", "Bounds", "Caps", "least_bounds", "least_totals", "span_s"]

_CHUNK = 150_000  # elements of a temporary: small enough for the cache


@dataclass(frozen=True)
class Caps:
    """The slowest stage or link that is allowed: forward and backward seconds of one micro-batch."""

    forward_s: float
    backward_s: float

    def keep(self, forward_s: Array, backward_s: Array, seconds: Array) -> Array:
        """`seconds` where both directions are under the caps, else infinite."""
        return np.where((forward_s <= self.forward_s) & (backward_s <= self.backward_s), seconds, np.inf)


NO_CAPS = Caps(np.inf, np.inf)


@dataclass(frozen=True)
class Bounds:
    """What the rest of the model takes at least; arrays of shape (states, units + 1).

    Attributes:
        totals: one micro-batch alone, through every stage and link and back.
        steps: a whole 1F1B step, counted from when this state's stage may start.
    """

    totals: Array
    steps: Array


def least_totals(space: Space, caps: Caps = NO_CAPS) -> Array:
    """Seconds of one micro-batch through the rest of the model and back, at least.

    Args:
        space: what may be chosen.
        caps: slower stages and links are not allowed.

    Returns:
        Shape (states, units + 1); infinite where nothing fits.
    """
    problem, lattice = space.problem, space.lattice
    links = caps.keep(problem.send_s, problem.gradient_s, problem.send_s + problem.gradient_s)
    totals = np.full((lattice.num_states, problem.num_units + 1), np.inf)
    cached: dict[tuple[int, int], Array] = {}
    for group in lattice.groups:
        after = np.min(totals[lattice.successors[group]] + _over(space, links, group), axis=1)
        after[lattice.may_end[group], -1] = 0.0
        for kind, behind, states in space.alike(group):
            key = (kind, space.in_flight(behind))
            if key not in cached:
                stage_s = caps.keep(
                    problem.forward_s(kind), problem.backward_s(kind), space.seconds(kind, behind)
                )
                cached = {
                    **{old: band for old, band in cached.items() if old[1] == key[1]},
                    key: _band(stage_s),
                }
            band = cached[key]
            for part in _chunks(states, band.size):
                totals[part] = np.min(band + _ahead(after[part - group.start], band), axis=2, initial=np.inf)
    return totals


def least_bounds(space: Space, limit_s: float = np.inf) -> Bounds:
    """A lower bound on the rest of a 1F1B step.

    With A the seconds from a step's start until a stage's first forward may start and from its last
    backward until the step's end, a step takes at least A plus the stage's own span (`span_s`), for every
    stage; and at least one micro-batch's way through everything plus M - 1 times any one transfer. The
    maximum over stages obeys `steps = max(span, f + b + c + steps of the next stage)`, so the least over
    all choices is a dynamic program over a scalar. The way behind a stage, which its span needs, enters
    as the least one, which can only lower the bound.

    Args:
        space: what may be chosen.
        limit_s: choices of which this is a lower bound may be left out.
    """
    problem, lattice = space.problem, space.lattice
    links = problem.send_s + problem.gradient_s
    others = (space.num_microbatches - 1) * np.maximum(problem.send_s, problem.gradient_s)
    shape = (lattice.num_states, problem.num_units + 1)
    bounds = Bounds(totals=np.full(shape, np.inf), steps=np.full(shape, np.inf))
    for group in lattice.groups:
        followers = lattice.successors[group]
        way = bounds.totals[followers] + _over(space, links, group)
        steps = np.maximum(
            bounds.steps[followers] + _over(space, links, group), way + _over(space, others, group)
        )
        way, steps = way.min(axis=1), steps.min(axis=1)
        way[lattice.may_end[group], -1] = steps[lattice.may_end[group], -1] = 0.0
        for kind, behind, states in space.alike(group):
            stage_s = space.seconds(kind, behind)
            band = _band(np.where(stage_s * space.num_microbatches < limit_s, stage_s, np.inf))
            fits, width = np.isfinite(band), band.shape[1]
            forward_s = np.where(fits, _band(problem.forward_s(kind), width), 0.0)
            backward_s = np.where(fits, _band(problem.backward_s(kind), width), 0.0)
            for part in _chunks(states, band.size):
                rest, later = _ahead(way[part - group.start], band), _ahead(steps[part - group.start], band)
                known = np.where(np.isfinite(rest), rest, 0.0)
                span = span_s(forward_s, backward_s, known, space.in_flight(behind), space.num_microbatches)
                bounds.totals[part] = np.min(band + rest, axis=2, initial=np.inf)
                bounds.steps[part] = np.min(np.maximum(span, band + later), axis=2, initial=np.inf)
    return bounds


def span_s(forward_s: Any, backward_s: Any, way_s: Any, depth: int, num_microbatches: int) -> Any:
    """Seconds from a stage's first forward to the end of its last backward under 1F1B, at least.

    All work, and waiting: micro-batch k's backward starts `way_s` after its forward ended, or later, and
    only `depth - 1` forwards (backwards) may run before the first (after the last) of them; in between
    are at most `depth - 1` of either, so that micro-batches 0, depth, 2 depth, ... form a chain.

    Args:
        forward_s, backward_s: of one micro-batch; numbers or arrays.
        way_s: one micro-batch's way through everything behind the stage and back.
        depth: forwards before the first backward, as `Space.in_flight` gives it.
        num_microbatches: micro-batches of the step.
    """
    count, held = num_microbatches, min(depth, num_microbatches) - 1
    work = count * (forward_s + backward_s)
    first_wait = np.maximum(0.0, way_s - held * forward_s)
    last_wait = np.maximum(0.0, way_s - held * backward_s)
    if depth >= count:
        return work + np.maximum(first_wait, last_wait)
    round_trip = forward_s + way_s + backward_s
    links, rest = (count - 1) // depth + 1, (count - 1) % depth
    chain = links * round_trip + rest * np.maximum(forward_s, backward_s)
    if rest < held:
        # A chain that starts later is one round trip shorter, with more work around it.
        early = (rest + 1) * forward_s + held * backward_s
        late = held * forward_s + (rest + 1) * backward_s
        chain = np.maximum(chain, (links - 1) * round_trip + np.maximum(early, late))
    return np.maximum(work + first_wait + last_wait, chain)


def _over(space: Space, link_s: Array, group: slice) -> Array:
    over = space.over_links(link_s, group)
    over[space.lattice.successors[group] < 0] = np.inf
    return over


def _band(by_stage: Array, width: int | None = None) -> Array:
    """From (first unit, end unit) to (first unit, units less one), as far as anything is finite.

    A stage that may not be slow has few units, so most of the square is empty.
    """
    units = len(by_stage)
    if width is None:
        first, end = np.nonzero(np.isfinite(by_stage))
        width = int(np.max(end - first, initial=0))
    ends = np.arange(units)[:, None] + np.arange(1, width + 1)
    return np.where(ends < units, by_stage[np.arange(units)[:, None], np.minimum(ends, units - 1)], np.inf)


def _ahead(values: Array, band: Array) -> Array:
    """Values at the end units of a band: shape (states, *band.shape), a view."""
    width = band.shape[1]
    padded = np.concatenate([values[:, 1:], np.full((len(values), width), np.inf)], axis=1)
    if width == 0:
        return np.empty((len(values), *band.shape))
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)


def _chunks(states: IntArray, size: int) -> Iterator[IntArray]:
    step = max(1, _CHUNK // max(1, size))
    for start in range(0, len(states), step):
        yield states[start : start + step]
