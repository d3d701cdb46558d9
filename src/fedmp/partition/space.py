"""What a search chooses from: a problem, a lattice of devices, and a schedule with its memory limits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedmp.partition.estimate import Array
from fedmp.partition.events import StageTimes
from fedmp.partition.lattice import IntArray, Lattice
from fedmp.partition.problem import Problem
from fedmp.schedule import peak_in_flight, schedule_by_name

__all__ = ["Choice", "Found", "Space", "in_flight_of", "told_apart"]


@dataclass(frozen=True)
class Choice:
    """Cuts and kinds of devices: `kinds[s]` runs the units from `edges[s]` to `edges[s + 1]`."""

    edges: tuple[int, ...]
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """The best choice of a search.

    Attributes:
        choice: None if nothing fits, or nothing beats the limit that the search was given.
        schedule: name of the schedule that `step_s` is for.
        step_s: predicted seconds of the choice's step; infinite without a choice.
        bound_s: no choice of the space is faster; equal to `step_s` where that is proved to be optimal.
    """

    choice: Choice | None
    schedule: str
    step_s: float
    bound_s: float


@dataclass(frozen=True)
class Space:
    """All choices that a search considers."""

    problem: Problem
    lattice: Lattice
    schedule: str

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one step."""
        return self.problem.costs.num_microbatches

    @property
    def num_cells(self) -> int:
        """Size of one dynamic program: states times pairs of units."""
        return self.lattice.num_states * (self.problem.num_units + 1) ** 2

    def in_flight(self, behind: int) -> int:
        """The most micro-batches held by a stage with `behind` stages to the end, itself included."""
        return in_flight_of(self.schedule, behind, self.num_microbatches)

    def seconds(self, kind: int, behind: int) -> Array:
        """Forward plus backward by (first unit, end unit); infinite where a stage does not fit."""
        both = self.problem.forward_s(kind) + self.problem.backward_s(kind)
        return np.where(self.problem.fits(kind, self.in_flight(behind)), both, np.inf)

    def alike(self, group: slice) -> Iterator[tuple[int, int, IntArray]]:
        """The states of a group by (kind, stages behind), as arrays of states."""
        kinds, behind = self.lattice.kinds[group], self.lattice.behind[group]
        for kind, depth in sorted(set(zip(kinds.tolist(), behind.tolist(), strict=True))):
            yield kind, depth, group.start + np.flatnonzero((kinds == kind) & (behind == depth))

    def over_links(self, link_s: Array, states: slice | int) -> Array:
        """`link_s[kinds, kinds of successors]`, shape (states, width, units + 1)."""
        lattice = self.lattice
        kinds, followers = lattice.kinds[states], lattice.successors[states]
        over: Array = link_s[kinds[..., None], lattice.kinds[followers]]
        return over

    def times(self, choice: Choice) -> StageTimes[float]:
        """Seconds of every stage and link of a choice."""
        problem, costs = self.problem, self.problem.costs
        edges = [problem.positions[edge] for edge in choice.edges]
        devices = [problem.device_of(kind) for kind in choice.kinds]
        stages = list(zip(edges[:-1], edges[1:], devices, strict=True))
        pairs = list(zip(choice.kinds[:-1], choice.kinds[1:], choice.edges[1:-1], strict=True))
        return StageTimes(
            forward_s=[float(costs.forward_s(*stage)) for stage in stages],
            backward_s=[float(costs.backward_s(*stage)) for stage in stages],
            send_s=[float(problem.send_s[pair]) for pair in pairs],
            gradient_s=[float(problem.gradient_s[pair]) for pair in pairs],
        )


@lru_cache(maxsize=1024)
def in_flight_of(schedule: str, behind: int, num_microbatches: int) -> int:
    """The most micro-batches held by a stage; it depends on the stages from it to the end alone.

    Args:
        schedule: "gpipe", "1f1b" or "1f1b-short".
        behind: stages from this one to the end, itself included.
        num_microbatches: micro-batches of the step.
    """
    first = schedule_by_name(schedule).actions(behind, num_microbatches)[0]
    return peak_in_flight(first)


def told_apart(schedule: str, num_microbatches: int) -> int:
    """The least number of stages behind with which a stage holds all micro-batches, as with any more."""
    return next(
        behind
        for behind in itertools.count(1)
        if in_flight_of(schedule, behind, num_microbatches) == num_microbatches
    )
