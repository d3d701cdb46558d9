"""Lattices hold exactly the pipelines they are meant to, and know how many stages are behind each."""

from __future__ import annotations

import itertools

import pytest

from fedmp.partition.lattice import Lattice, any_order, count_any_order, fixed_order
from fedmp.partition.window import window_lattice

Pipelines = set[tuple[int, ...]]


def pipelines(lattice: Lattice, num_told_apart: int) -> Pipelines:
    """The kinds along every path to a state that may end; checks `behind` and the groups on the way."""
    paths: dict[int, Pipelines] = {}
    for group in lattice.groups:
        for state in range(group.start, group.stop):
            kind, followers = int(lattice.kinds[state]), [int(s) for s in lattice.successors[state] if s >= 0]
            assert all(follower < group.start for follower in followers)
            paths[state] = {(kind, *rest) for follower in followers for rest in paths[follower]}
            if lattice.may_end[state]:
                paths[state].add((kind,))
            assert all(min(len(path), num_told_apart) == lattice.behind[state] for path in paths[state])
    assert len(paths) == lattice.num_states
    return set().union(*paths.values())


@pytest.mark.parametrize("counts", [[1], [3], [1, 1, 1], [2, 2]])
def test_any_order_is_every_order_of_every_choice(counts: list[int]) -> None:
    devices = [kind for kind, count in enumerate(counts) for _ in range(count)]
    for max_stages in range(1, len(devices) + 1):
        wanted = {
            order for size in range(1, max_stages + 1) for order in itertools.permutations(devices, size)
        }
        assert pipelines(any_order(counts, max_stages), len(devices)) == wanted


@pytest.mark.parametrize("counts", [[1], [3], [1, 1, 1], [2, 3], [3, 3, 2]])
def test_states_are_counted_as_they_are_made(counts: list[int]) -> None:
    made = [any_order(counts, stages).num_states for stages in range(1, sum(counts) + 1)]
    assert count_any_order(counts).tolist() == [0, *made]


@pytest.mark.parametrize("num_told_apart", [1, 2, 3, 9])
@pytest.mark.parametrize("kinds", [(0,), (0, 1, 2, 3), (1, 0, 1, 1)])
def test_fixed_order_is_every_choice_in_order(kinds: tuple[int, ...], num_told_apart: int) -> None:
    wanted = {chosen for size in range(1, len(kinds) + 1) for chosen in itertools.combinations(kinds, size)}
    assert pipelines(fixed_order(kinds, num_told_apart), min(num_told_apart, len(kinds))) == wanted


@pytest.mark.parametrize("num_told_apart", [2, 3, 5, 9])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 2), (1, 3), (3, 5), (0, 5)])
@pytest.mark.parametrize("spares", [[], [7], [2, 7]])
def test_a_window_frees_its_stages_and_no_other(
    num_told_apart: int, start: int, stop: int, spares: list[int]
) -> None:
    order = [0, 1, 2, 1, 3]
    before, after = tuple(order[:start]), tuple(order[stop:])
    pool = [*order[start:stop], *spares]
    whole = {
        (*before, *inside, *after)
        for size in range(len(pool) + 1)
        for inside in itertools.permutations(pool, size)
    }
    # Any state may come first, so the first stages may be missing.
    wanted = {pipeline[first:] for pipeline in whole for first in range(len(pipeline))}
    assert (
        pipelines(window_lattice(order, slice(start, stop), spares, num_told_apart), num_told_apart) == wanted
    )
