"""A pipeline's devices with a few of them freed, as a lattice: the neighbourhood of a choice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from fedmp.partition.lattice import Lattice, make_lattice

__all__ = ["window_lattice"]


class _Key(NamedTuple):
    """A state of a window's lattice. `rank` comes first, so that sorting puts followers before."""

    rank: int
    behind: int
    kind: int
    part: str
    detail: tuple[int, ...]


def window_lattice(
    order: Sequence[int], window: slice, spares: Sequence[int], num_told_apart: int
) -> Lattice:
    """A pipeline's devices, those in a window free to change order, to leave, and to be replaced.

    Args:
        order: kinds of the pipeline's stages.
        window: the stages that are free; none, for a pipeline whose cuts alone are free.
        spares: kinds of unused devices that the window may take in, once for each device.
        num_told_apart: as in `fixed_order`.
    """
    before, after = list(order[: window.start])[::-1], list(order[window.stop :])[::-1]
    pool = [*order[window], *spares]
    kinds = sorted(set(pool))
    multisets = list(itertools.product(*(range(pool.count(kind) + 1) for kind in kinds)))

    def depth(behind: int) -> int:
        return min(behind, num_told_apart)

    def head_at(place: int, taken: int) -> list[_Key]:
        """Before the window, how many stages it takes counts only as far as memory depends on it."""
        taken = min(taken, max(0, num_told_apart - len(after) - place - 1))
        behind = depth(len(after) + taken + place + 1)
        return [_Key(len(after) + len(pool) + place + 1, behind, before[place], "before", (place, taken))]

    tail = [_Key(place + 1, depth(place + 1), kind, "after", ()) for place, kind in enumerate(after)]
    middle = {
        used: [
            _Key(len(after) + sum(used), depth(len(after) + sum(used)), kind, "window", used)
            for kind, count in zip(kinds, used, strict=True)
            if count > 0
        ]
        or tail[-1:]
        for used in multisets
    }

    def followers(key: _Key) -> list[_Key]:
        if key.part == "after":
            return tail[key.rank - 2 : key.rank - 1]
        if key.part == "window":
            own = kinds.index(key.kind)
            fewer = (*key.detail[:own], key.detail[own] - 1, *key.detail[own + 1 :])
            return middle[fewer]
        place, own_taken = key.detail
        takings = [taken for taken in range(len(pool) + 1) if head_at(place, taken)[0].detail[1] == own_taken]
        if place > 0:
            return list(dict.fromkeys(head for taken in takings for head in head_at(place - 1, taken)))
        return [first for used in multisets if sum(used) in takings for first in middle[used]]

    heads = [
        key for place in range(len(before)) for taken in range(len(pool) + 1) for key in head_at(place, taken)
    ]
    inside = [key for used in multisets if sum(used) for key in middle[used]]
    return make_lattice(
        sorted({*tail, *inside, *heads}),
        kind=lambda key: key.kind,
        behind=lambda key: key.behind,
        followers=followers,
        group=lambda key: key.rank,
    )
