"""Which devices may still be used, as a graph: the device half of a search's states.

A state says which kind of device runs the next stage and what may follow it. States without cycles, listed
from the end of the pipeline to its start; a plan is a path. Searching any order takes a state for each
multiset of kinds that runs the rest and each first kind in it; a fixed order, far fewer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fedmp.partition.problem import BoolArray

__all__ = [
    "IntArray",
    "Lattice",
    "any_order",
    "count_any_order",
    "fixed_order",
    "make_lattice",
]

IntArray = npt.NDArray[np.int64]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Lattice:
    """All states; any of them may be a plan's first.

    Attributes:
        kinds: shape (states,); the kind of device that runs the state's own stage.
        behind: shape (states,); stages from this one to the end, itself included, or more where the
            number makes no difference.
        successors: shape (states, width); states of the next stage, -1 where there are fewer.
        may_end: shape (states,); whether the pipeline may end with this stage.
        groups: slices of states that do not follow each other; successors are in earlier slices.
    """

    kinds: IntArray
    behind: IntArray
    successors: IntArray
    may_end: BoolArray
    groups: tuple[slice, ...]

    @property
    def num_states(self) -> int:
        """How many states there are."""
        return len(self.kinds)


def any_order(counts: Sequence[int], max_stages: int) -> Lattice:
    """Every order of every choice of devices.

    Args:
        counts: devices of each kind.
        max_stages: stages of a plan at most.
    """
    multisets = sorted(
        itertools.product(*(range(count + 1) for count in counts)), key=lambda used: (sum(used), used)
    )
    keys = [
        (used, kind)
        for used in multisets
        for kind, count in enumerate(used)
        if count and sum(used) <= max_stages
    ]

    def followers(key: tuple[tuple[int, ...], int]) -> list[tuple[tuple[int, ...], int]]:
        used, kind = key
        rest = (*used[:kind], used[kind] - 1, *used[kind + 1 :])
        return [(rest, follower) for follower, count in enumerate(rest) if count]

    return make_lattice(keys, kind=lambda key: key[1], behind=lambda key: sum(key[0]), followers=followers)


def count_any_order(counts: Sequence[int]) -> IntArray:
    """States that `any_order` makes for 0, 1, 2, ... stages at most, without making them."""
    # Multisets by size, and those that have a certain device, as products of 1 + x + x^2 + ...
    states = np.zeros(sum(counts) + 1, dtype=np.float64)
    for first in range(len(counts)):
        by_size = np.ones(1)
        for kind, count in enumerate(counts):
            by_size = np.convolve(by_size, [0.0 if kind == first else 1.0, *[1.0] * count])
        states += by_size
    return np.cumsum(np.minimum(states, 1e15)).astype(np.int64)


def fixed_order(kinds: Sequence[int], num_told_apart: int) -> Lattice:
    """Every choice of devices in the order given.

    Args:
        kinds: of each device, in order.
        num_told_apart: from so many stages behind on, a stage's memory no longer depends on how many
            there are, and they share states; 1 under GPipe.
    """
    last = max(1, min(num_told_apart, len(kinds)))
    keys = [(behind, device) for behind in range(1, last) for device in range(len(kinds) - 1, -1, -1)]
    keys += [(last, device) for device in range(len(kinds) - 1, -1, -1)]

    def followers(key: tuple[int, int]) -> list[tuple[int, int]]:
        behind, device = key
        depths = {max(1, behind - 1), behind} if behind == last else {behind - 1}
        return [(depth, later) for depth in sorted(depths) for later in range(device + 1, len(kinds))]

    return make_lattice(
        keys,
        kind=lambda key: kinds[key[1]],
        behind=lambda key: key[0],
        followers=followers,
        group=lambda key: key if key[0] == last else key[0],
    )


def make_lattice(
    keys: Iterable[Key],
    *,
    kind: Callable[[Key], int],
    behind: Callable[[Key], int],
    followers: Callable[[Key], Iterable[Key]],
    group: Callable[[Key], Hashable] | None = None,
) -> Lattice:
    """Build a lattice from rules.

    Args:
        keys: the states, each after those that may follow it.
        kind, behind: of a state; with 1 behind, a pipeline may end.
        followers: states that may follow; those that are not among `keys` are left out.
        group: states that are next to each other and equal in this do not follow each other; by
            default, `behind`.
    """
    listed = list(keys)
    index = {key: position for position, key in enumerate(listed)}
    rows = [[index[follower] for follower in followers(key) if follower in index] for key in listed]
    successors = np.full((len(listed), max(1, *map(len, rows), 1)), -1, dtype=np.int64)
    for row, found in enumerate(rows):
        successors[row, : len(found)] = found
    slices, start = [], 0
    for _, members in itertools.groupby(listed, key=group or behind):
        stop = start + len(list(members))
        slices.append(slice(start, stop))
        start = stop
    return Lattice(
        kinds=np.asarray([kind(key) for key in listed], dtype=np.int64),
        behind=np.asarray([behind(key) for key in listed], dtype=np.int64),
        successors=successors,
        may_end=np.asarray([behind(key) == 1 for key in listed]),
        groups=tuple(slices),
    )
