"""Which devices may still be used, as a graph: the device half of a search's states.

A state says which kind of device runs the next stage and what may follow it. States without cycles, listed
from the end of the pipeline to its start; a plan is a path. Searching any order takes a state for each
multiset of kinds that runs the rest and each first kind in it; a fixed order, far fewer.
"""

from __future__ import annotations

import itertools
import math
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
    "fixed_order_counted",
    "make_lattice",
]

IntArray = npt.NDArray[np.int64]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Lattice:
    """All states; any of them may be a plan's first.

    Attributes:
        kinds: shape (states,); the kind of device that runs the state's own stage.
        behind: shape (states,); stages from this one to the end, itself included; 0 where it varies.
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


def count_any_order(counts: Sequence[int]) -> int:
    """States that `any_order` makes without a limit on stages, without making them."""
    multisets = math.prod(count + 1 for count in counts)
    return sum(multisets * count // (count + 1) for count in counts)


def fixed_order(kinds: Sequence[int]) -> Lattice:
    """Every choice of devices in the order given, without counting stages.

    Enough where a stage's memory does not depend on the number of stages behind it, as in GPipe.

    Args:
        kinds: of each device, in order.
    """
    return make_lattice(
        range(len(kinds) - 1, -1, -1),
        kind=lambda device: kinds[device],
        behind=lambda device: 0,
        followers=lambda device: range(device + 1, len(kinds)),
        may_end=lambda device: True,
        group=lambda device: device,
    )


def fixed_order_counted(kinds: Sequence[int], max_stages: int) -> Lattice:
    """Every choice of devices in the order given, by number of stages.

    Args:
        kinds: of each device, in order.
        max_stages: stages of a plan at most.
    """
    keys = [
        (behind, device)
        for behind in range(1, min(len(kinds), max_stages) + 1)
        for device in range(len(kinds) - behind + 1)
    ]
    return make_lattice(
        keys,
        kind=lambda key: kinds[key[1]],
        behind=lambda key: key[0],
        followers=lambda key: [(key[0] - 1, later) for later in range(key[1] + 1, len(kinds))],
    )


def make_lattice(
    keys: Iterable[Key],
    *,
    kind: Callable[[Key], int],
    behind: Callable[[Key], int],
    followers: Callable[[Key], Iterable[Key]],
    may_end: Callable[[Key], bool] | None = None,
    group: Callable[[Key], int] | None = None,
) -> Lattice:
    """Build a lattice from rules.

    Args:
        keys: the states, each after those that may follow it.
        kind, behind: of a state.
        followers: states that may follow; those that are not among `keys` are left out.
        may_end: whether a state may be the last stage; by default, those with one stage behind.
        group: states that are next to each other and equal in this do not follow each other; by
            default, `behind`.
    """
    listed = list(keys)
    ends, grouping = may_end or (lambda key: behind(key) == 1), group or behind
    index = {key: position for position, key in enumerate(listed)}
    rows = [[index[follower] for follower in followers(key) if follower in index] for key in listed]
    successors = np.full((len(listed), max(1, *map(len, rows), 1)), -1, dtype=np.int64)
    for row, found in enumerate(rows):
        successors[row, : len(found)] = found
    slices, start = [], 0
    for _, members in itertools.groupby(listed, key=grouping):
        stop = start + len(list(members))
        slices.append(slice(start, stop))
        start = stop
    return Lattice(
        kinds=np.asarray([kind(key) for key in listed], dtype=np.int64),
        behind=np.asarray([behind(key) for key in listed], dtype=np.int64),
        successors=successors,
        may_end=np.asarray([ends(key) for key in listed]),
        groups=tuple(slices),
    )
