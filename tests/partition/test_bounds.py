"""Lower bounds: no choice may be faster, whoever bounds it."""

from __future__ import annotations

import numpy as np
import pytest

from fedmp.partition import cost_model, step_s
from fedmp.partition.bound import step_bound_s
from fedmp.partition.lattice import any_order
from fedmp.partition.problem import make_problem
from fedmp.partition.search import search
from fedmp.partition.space import Choice, Space
from fedmp.partition.sweep import least_bounds, least_totals
from tests.partition.instances import brute_force, random_instance


def spaces(seed: int, schedule: str) -> Space:
    """All choices of one random problem with memory enough."""
    instance = random_instance(
        2 * seed, num_layers=(6, 14), num_devices=(2, 5), num_microbatches=(1, 2, 4, 9, 20)
    )
    costs = cost_model(instance.profile, instance.num_microbatches)
    problem = make_problem(costs, instance.devices, instance.links)
    return Space(problem, any_order([len(kind) for kind in problem.kinds], problem.num_units), schedule)


def random_walk(space: Space, rng: np.random.Generator) -> tuple[int, Choice]:
    """Any choice, and the state that it starts from."""
    lattice, units = space.lattice, space.problem.num_units
    first = state = int(rng.choice(np.flatnonzero(lattice.behind <= units)))
    states = [state]
    while lattice.behind[state] > 1:
        state = int(rng.choice(lattice.successors[state][lattice.successors[state] >= 0]))
        states.append(state)
    cuts = (
        sorted(rng.choice(np.arange(1, units), size=len(states) - 1, replace=False).tolist())
        if units > 1
        else []
    )
    return first, Choice((0, *cuts, units), tuple(int(lattice.kinds[state]) for state in states))


@pytest.mark.parametrize("schedule", ["1f1b", "1f1b-short"])
def test_no_simulated_1f1b_step_is_faster_than_its_bound(schedule: str) -> None:
    rng = np.random.default_rng(0)
    tight = []
    for seed in range(30):
        space = spaces(seed, schedule)
        bounds, totals = least_bounds(space), least_totals(space)
        np.testing.assert_allclose(bounds.totals, totals, rtol=1e-12)
        for _ in range(20):
            state, choice = random_walk(space, rng)
            seconds = step_s(space.times(choice), schedule, space.num_microbatches)
            assert bounds.steps[state, 0] <= seconds * (1 + 1e-12)
            tight.append(bounds.steps[state, 0] / seconds)
    assert max(tight) > 0.999


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "1f1b-short"])
def test_the_quick_bound_is_below_the_best_of_all_plans(schedule: str) -> None:
    for seed in range(30):
        instance = random_instance(seed)
        costs = cost_model(instance.profile, instance.num_microbatches)
        bound_s = step_bound_s(costs, instance.devices, instance.links, schedule)
        assert 0 < bound_s <= brute_force(instance, (schedule,)).step_s * (1 + 1e-12), f"seed {seed}"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_search_that_is_cut_short_still_bounds_the_optimum(schedule: str) -> None:
    for seed in range(12):
        space = spaces(seed, schedule)
        full = search(space, max_expansions=20_000)
        assert full.bound_s == full.step_s
        for effort in (1, 5, 20, 60):
            short = search(space, max_expansions=effort)
            assert short.choice is not None
            assert short.bound_s <= full.step_s * (1 + 1e-12) <= short.step_s * (1 + 2e-12)


def test_a_search_with_a_limit_finds_only_what_is_faster() -> None:
    for schedule in ("gpipe", "1f1b"):
        space = spaces(3, schedule)
        best = search(space, max_expansions=20_000)
        assert search(space, max_expansions=20_000, limit_s=best.step_s * 1.01).step_s == best.step_s
        assert search(space, max_expansions=20_000, limit_s=best.step_s).choice is None
