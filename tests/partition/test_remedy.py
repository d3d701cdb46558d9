"""Where nothing fits, the error names a change that makes it fit, and the smallest."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fedmp.errors import InfeasibleError
from fedmp.partition import Balanced, Exact, cost_model
from fedmp.partition.remedy import least_extra_bytes
from fedmp.records import LayerProfile, Profile
from fedmp.topology import Device, Links
from tests.partition.instances import Instance, random_instance

MIB = 1 << 20


def blocks(*parameter_mib: int, activation_mib: float = 0.0) -> Profile:
    """Layers with so many MiB of parameters, whose training takes three times as much."""
    return Profile(
        layers=tuple(
            LayerProfile(
                name=f"l{index}",
                forward_s=1e-3,
                backward_s=1e-3,
                parameters=(f"p{index}",),
                activation_bytes=activation_mib * MIB,
            )
            for index in range(len(parameter_mib))
        ),
        parameter_bytes={f"p{index}": size * MIB for index, size in enumerate(parameter_mib)},
        reference_flops_per_s=1e11,
        batch_size=8,
    )


def refusal(partitioner: Exact | Balanced, profile: Profile, devices: list[Device]) -> str:
    with pytest.raises(InfeasibleError) as error:
        partitioner.plan(profile, devices, Links(), num_microbatches=8)
    return str(error.value)


def test_exact_says_how_much_more_memory_or_how_many_more_devices_would_do() -> None:
    # 6 layers of 30 MiB each; 70 MiB hold two, 40 MiB hold one: three layers' room for six.
    devices = [Device("a", memory_bytes=70 * MIB), Device("b", memory_bytes=40 * MIB)]
    message = refusal(Exact(schedule="1f1b-short"), blocks(*[10] * 6), devices)
    assert message == (
        "the model does not fit the 2 devices; it would with 80.0 MiB more on device 'a' (now 70.0 MiB), "
        "or with 2 more devices like 'a' (70.0 MiB)"
    )


def test_what_exact_says_is_enough_and_not_too_much() -> None:
    seen = 0
    for seed in range(1, 120, 2):
        instance = random_instance(seed)
        try:
            plan_with(instance, {})
        except InfeasibleError:
            seen += 1
            costs = cost_model(instance.profile, instance.num_microbatches)
            for target, device in enumerate(instance.devices):
                extra = least_extra_bytes(
                    costs, instance.devices, "1f1b-short", target=target, in_order=False
                )
                assert extra is not None
                assert extra > 0
                plan_with(instance, {device.name: int(-(-extra // 1))})
                with pytest.raises(InfeasibleError):
                    plan_with(instance, {device.name: int(-(-extra // 1)) - 1})
    assert seen > 8


def plan_with(instance: Instance, extra: dict[str, int]) -> None:
    devices = [
        replace(device, memory_bytes=device.memory_bytes + extra.get(device.name, 0))
        for device in instance.devices
    ]
    Exact().plan(instance.profile, devices, instance.links, num_microbatches=instance.num_microbatches)


def test_balanced_points_to_another_order_where_one_fits() -> None:
    devices = [Device("small", memory_bytes=40 * MIB), Device("large", memory_bytes=130 * MIB)]
    message = refusal(Balanced(), blocks(40, 10), devices)
    assert "in this order" in message
    assert (
        "with 80.0 MiB more on device 'small'" in message or "with 20.0 MiB more on device 'large'" in message
    )
    assert "in another order, which the exact partitioner finds" in message
    assert Exact().plan(blocks(40, 10), devices, Links(), num_microbatches=8).num_stages == 2


def test_other_ways_out_are_named_where_they_exist() -> None:
    profile = blocks(1, 1, activation_mib=100.0)
    devices = [Device("a", memory_bytes=90 * MIB)]
    with pytest.raises(InfeasibleError) as error:
        Exact(schedule="gpipe").plan(profile, devices, Links(), num_microbatches=2)
    assert "the schedule '1f1b-short'" in str(error.value)
    assert "a smaller micro-batch (now 4)" in str(error.value)


def test_many_different_devices_are_refused_quickly() -> None:
    devices = [Device(f"d{index}", memory_bytes=MIB + index) for index in range(40)]
    assert re.match("the model does not fit the 40 devices", refusal(Exact(), blocks(*[10] * 60), devices))
