"""`Exact` against brute force, and what it promises about bounds, kinds of devices and errors."""

from __future__ import annotations

import math
import random

import pytest

from fedmp.errors import PlanError
from fedmp.partition import Balanced, Exact, Uniform
from fedmp.records import Profile
from fedmp.topology import Device, Link, Links
from tests.partition.instances import brute_force, random_instance

# Both sides add the same numbers, in another order.
RELATIVE = 1e-9


def agree(seed: int) -> None:
    """`Exact` finds what brute force finds, for one random problem under each schedule."""
    instance = random_instance(seed, can_rule=True)
    for schedule, allowed in (
        ("gpipe", ("gpipe",)),
        ("1f1b", ("1f1b", "1f1b-short")),
        ("1f1b-short", ("1f1b-short",)),
        ("zero-bubble", ("zero-bubble",)),
    ):
        best = brute_force(instance, allowed)
        try:
            plan = Exact(schedule=schedule).plan(
                instance.profile,
                instance.devices,
                instance.links,
                num_microbatches=instance.num_microbatches,
            )
        except PlanError:
            assert math.isinf(best.step_s), f"seed {seed}, {schedule}: feasible with {best}"
            continue
        assert plan.step_s == pytest.approx(best.step_s, rel=RELATIVE), f"seed {seed}, {schedule}"
        assert plan.gap <= RELATIVE, f"seed {seed}, {schedule}: optimal, but not proved"


@pytest.mark.parametrize("seed", range(50))
def test_exact_agrees_with_brute_force(seed: int) -> None:
    agree(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50, 550))
def test_exact_agrees_with_brute_force_on_500_more(seed: int) -> None:
    agree(seed)


def open_profile(num_layers: int, seed: int = 0) -> Profile:
    """Unequal layers that may be cut anywhere."""
    profile = random_instance(seed, num_layers=(num_layers, num_layers), can_bind=False).profile
    layers = tuple(layer.model_copy(update={"can_cut_after": True}) for layer in profile.layers)
    return profile.model_copy(update={"layers": layers, "batch_size": 32})


def unequal_devices(count: int, *, seed: int = 0, kinds: int | None = None) -> list[Device]:
    """Devices whose speeds spread 1:10, all of the same ample memory."""
    rng = random.Random(seed)
    speeds = [1e11 * 10 ** rng.uniform(0, 1) for _ in range(kinds or count)]
    return [Device(f"d{index}", speeds[index % len(speeds)], 1 << 40) for index in range(count)]


def test_exact_puts_the_devices_in_a_better_order_and_leaves_a_slow_one_out() -> None:
    profile = open_profile(12)
    devices = [Device("slow", 2e11, 1 << 40), Device("crawl", 1e6, 1 << 40), Device("fast", 4e11, 1 << 40)]
    pairs = {"slow,fast": Link(1e9, 0.0)}
    plan = Exact().plan(profile, devices, Links(Link(1e5, 0.1), pairs), num_microbatches=8)
    assert plan.unused_devices == ("crawl",)
    assert plan.gap == 0.0


def test_exact_takes_the_short_warm_up_where_memory_allows_no_other() -> None:
    profile = open_profile(8)
    layers = tuple(layer.model_copy(update={"activation_bytes": 1e6}) for layer in profile.layers)
    profile = profile.model_copy(
        update={"layers": layers, "parameter_bytes": dict.fromkeys(profile.parameter_bytes, 1)}
    )
    short = Uniform(schedule="1f1b-short").plan(profile, unequal_devices(4), Links(), num_microbatches=8)
    devices = [
        Device(stage.device, 1e11, stage.memory_bytes + 1000)
        for stage in sorted(short.stages, key=lambda s: s.device)
    ]
    assert Exact().plan(profile, devices, Links(), num_microbatches=8).schedule == "1f1b-short"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_more_effort_never_gives_a_slower_plan_or_a_lower_bound(schedule: str) -> None:
    profile, devices = open_profile(20), unequal_devices(6)
    plans = [
        Exact(schedule=schedule, max_expansions=effort).plan(profile, devices, Links(), num_microbatches=8)
        for effort in (1, 30, 3000)
    ]
    assert [plan.step_s for plan in plans] == sorted((plan.step_s for plan in plans), reverse=True)
    assert all(plan.bound_s <= plans[-1].step_s for plan in plans)
    assert plans[-1].gap == 0.0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_too_many_different_devices_give_a_good_plan_with_an_honest_gap(schedule: str) -> None:
    profile, devices = open_profile(40), unequal_devices(14)
    plan = Exact(schedule=schedule).plan(profile, devices, Links(), num_microbatches=8)
    balanced = Balanced(schedule=schedule).plan(profile, devices, Links(), num_microbatches=8)
    assert plan.step_s <= balanced.step_s
    assert 0.0 < plan.gap < 0.5


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "1f1b-short"])
def test_a_neighbourhood_search_comes_close_to_the_optimum(schedule: str) -> None:
    ratios = []
    for seed in range(4):
        profile, devices = open_profile(16, seed), unequal_devices(6, seed=seed)
        best = Exact(schedule=schedule).plan(profile, devices, Links(), num_microbatches=8)
        near = Exact(schedule=schedule, max_cells=1).plan(profile, devices, Links(), num_microbatches=8)
        ratios.append(near.step_s / best.step_s)
    assert min(ratios) >= 1 - 1e-9
    assert sorted(ratios)[len(ratios) // 2] < 1.05


def test_a_model_with_very_many_layers_is_planned_from_fewer_places_to_cut() -> None:
    profile, devices = open_profile(300), unequal_devices(6)
    plan = Exact().plan(profile, devices, Links(), num_microbatches=8)
    assert plan.step_s <= Balanced().plan(profile, devices, Links(), num_microbatches=8).step_s
    assert plan.gap < 0.5


def test_layers_that_take_no_time_are_planned() -> None:
    profile = open_profile(4)
    layers = tuple(layer.model_copy(update={"forward_s": 0.0, "backward_s": 0.0}) for layer in profile.layers)
    for schedule in ("gpipe", "1f1b"):
        plan = Exact(schedule=schedule).plan(
            profile.model_copy(update={"layers": layers}), unequal_devices(3), Links(), num_microbatches=2
        )
        assert plan.step_s == 0.0
        assert plan.gap == 0.0
