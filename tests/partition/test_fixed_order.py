"""`Uniform` and `Balanced`: both keep the devices in the order given."""

from __future__ import annotations

import itertools
import math

import pytest

from fedmp.errors import PlanError
from fedmp.partition import Balanced, Uniform
from fedmp.records import Profile
from fedmp.topology import Device, Links
from tests.partition.instances import Instance, order_of, plain_step_s, random_instance

BIG = 1 << 40


def best_in_order(instance: Instance, schedule: str) -> float:
    """Try every cut and every choice of devices in the order given."""
    layers = instance.profile.layers
    places = [index + 1 for index in range(len(layers) - 1) if layers[index].can_cut_after]
    return min(
        plain_step_s(instance, cuts, chosen, schedule)
        for count in range(1, min(len(instance.devices), len(places) + 1) + 1)
        for cuts in itertools.combinations(places, count - 1)
        for chosen in itertools.combinations(instance.devices, count)
    )


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "1f1b-short"])
def test_balanced_agrees_with_brute_force_in_the_given_order(schedule: str) -> None:
    for seed in range(60):
        instance = random_instance(seed, can_rule=True)
        best = best_in_order(instance, schedule)
        partitioner = Balanced(schedule=schedule, max_expansions=5000)
        if math.isinf(best):
            with pytest.raises(PlanError):
                partitioner.plan(
                    instance.profile,
                    instance.devices,
                    instance.links,
                    num_microbatches=instance.num_microbatches,
                )
            continue
        plan = partitioner.plan(
            instance.profile, instance.devices, instance.links, num_microbatches=instance.num_microbatches
        )
        names = [device.name for device in instance.devices]
        assert list(order_of(plan)) == sorted(order_of(plan), key=names.index)
        assert plan.step_s == pytest.approx(best, rel=1e-9), f"seed {seed}"
        assert plan.bound_s <= plan.step_s


def test_uniform_keeps_forced_cuts_and_pinned_layers_wherever_that_is_possible() -> None:
    planned = 0
    for seed in range(0, 300, 3):
        instance = random_instance(seed, can_bind=False, can_rule=True)
        layers, devices = instance.profile.layers, instance.devices
        places = [index + 1 for index in range(len(layers) - 1) if layers[index].can_cut_after]
        ideal = [stage * len(layers) / len(devices) for stage in range(1, len(devices))]
        distances = {
            cuts: sum(abs(cut - wanted) for cut, wanted in zip(cuts, ideal, strict=True))
            for cuts in itertools.combinations(places, len(devices) - 1)
            if plain_step_s(instance, cuts, devices, "gpipe") < math.inf
        }
        if not distances:
            with pytest.raises(PlanError):
                Uniform().plan(instance.profile, devices, instance.links, num_microbatches=2)
            continue
        plan = Uniform().plan(instance.profile, devices, instance.links, num_microbatches=2)
        assert distances[plan.cuts] == pytest.approx(min(distances.values()), abs=1e-9), f"seed {seed}"
        planned += 1
    assert planned > 20


def wide_instance(seed: int = 0) -> Instance:
    return random_instance(seed, num_layers=(12, 12), num_devices=(4, 4), can_bind=False)


def test_uniform_uses_every_device_in_order_with_equal_numbers_of_layers() -> None:
    profile = wide_instance().profile
    open_layers = tuple(layer.model_copy(update={"can_cut_after": True}) for layer in profile.layers)
    devices = [Device(f"d{index}", memory_bytes=BIG) for index in range(5)]
    plan = Uniform().plan(
        profile.model_copy(update={"layers": open_layers}), devices, Links(), num_microbatches=4
    )
    assert order_of(plan) == ("d0", "d1", "d2", "d3", "d4")
    assert plan.cuts == (2, 5, 7, 10)  # 2.4, 4.8, 7.2 and 9.6, rounded


def test_uniform_takes_the_nearest_allowed_cut() -> None:
    profile = wide_instance().profile
    layers = tuple(
        layer.model_copy(update={"can_cut_after": index not in (4, 5, 6)})
        for index, layer in enumerate(profile.layers)
    )
    devices = [Device("a", memory_bytes=BIG), Device("b", memory_bytes=BIG)]
    plan = Uniform().plan(profile.model_copy(update={"layers": layers}), devices, Links(), num_microbatches=4)
    assert plan.cuts == (4,)


def test_uniform_refuses_more_devices_than_layers_or_pieces() -> None:
    profile = wide_instance().profile
    devices = [Device(f"d{index}", memory_bytes=BIG) for index in range(13)]
    with pytest.raises(PlanError, match="13 stages asked for, but the model has only 12 layers"):
        Uniform().plan(profile, devices, Links(), num_microbatches=4)
    closed: Profile = profile.model_copy(
        update={
            "layers": tuple(layer.model_copy(update={"can_cut_after": False}) for layer in profile.layers)
        }
    )
    with pytest.raises(PlanError, match="can be cut into 1 pieces at most"):
        Uniform().plan(closed, devices[:2], Links(), num_microbatches=4)


def test_balanced_leaves_a_device_out_that_would_only_slow_it_down() -> None:
    instance = wide_instance()
    devices = [Device("fast", 1e12, BIG), Device("crawl", 1e6, BIG), Device("fast2", 1e12, BIG)]
    plan = Balanced().plan(instance.profile, devices, Links(), num_microbatches=8)
    assert "crawl" in plan.unused_devices


@pytest.mark.parametrize("partitioner", [Uniform, Balanced])
def test_an_unknown_schedule_is_refused(partitioner: type[Uniform] | type[Balanced]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        partitioner(schedule="zigzag")
