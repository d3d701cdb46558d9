"""Forced cuts and pinned layers: what is refused, by whom, and how it is said. `test_exact` plans with them."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from fedmp.errors import PlanError
from fedmp.partition import Balanced, Exact, Partitioner, Uniform, build_plan, check_partitioner
from fedmp.partition.contract import contract_cases
from fedmp.partition.placed_events import place
from fedmp.records import LayerProfile, Profile
from fedmp.topology import Device, Links

BIG = 1 << 40
A, B, C = (Device(name, 1e11, BIG) for name in "abc")


def six_layers(
    *, force: tuple[int, ...] = (), forbid: tuple[int, ...] = (), pins: dict[int, str] | None = None
) -> Profile:
    """Equal layers l0 to l5; cuts after some forced or forbidden, some pinned."""
    layers = tuple(
        LayerProfile(
            name=f"l{index}",
            forward_s=1e-3,
            backward_s=2e-3,
            can_cut_after=index not in forbid,
            must_cut_after=index in force,
            device=(pins or {}).get(index),
        )
        for index in range(6)
    )
    return Profile(layers=layers, parameter_bytes={}, reference_flops_per_s=1e11, batch_size=8)


@pytest.mark.parametrize("partitioner", [Uniform(), Balanced(), Exact()], ids=repr)
@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (six_layers(pins={2: "gateway"}), "'l2' is to run on device 'gateway', but there are only a, b, c"),
        (six_layers(pins={0: "a", 2: "b", 4: "a"}), "run layers 'l0' and 'l4', but 'l2' comes between them"),
        (six_layers(pins={0: "a", 4: "a"}, force=(2,)), "run layers 'l0' and 'l4', but a cut comes between"),
        (six_layers(pins={0: "a", 1: "b"}, forbid=(0,)), "the model cannot be cut between them"),
        (six_layers(force=(0, 1, 2)), "make at least 4 stages, but there are 3 devices"),
        (six_layers(force=(0, 3), pins={4: "a", 5: "b"}), "make at least 4 stages, but there are 3 devices"),
    ],
)
def test_rules_that_no_plan_can_keep_are_refused(
    partitioner: Partitioner, profile: Profile, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        partitioner.plan(profile, [A, B, C], Links(), num_microbatches=4)


def test_pins_against_the_order_given_are_kept_by_exact_alone() -> None:
    profile = six_layers(pins={0: "c", 5: "a"})
    plan = Exact().plan(profile, [A, B, C], Links(), num_microbatches=4)
    assert (plan.stages[0].device, plan.stages[-1].device) == ("c", "a")
    for partitioner in (Uniform(), Balanced()):
        with pytest.raises(PlanError, match="a, b, c, in this order.*'?exact"):
            partitioner.plan(profile, [A, B, C], Links(), num_microbatches=4)


def test_a_forced_cut_is_made_where_one_device_would_be_faster() -> None:
    slow = Device("slow", 1e6, BIG)
    for partitioner in (Balanced(), Exact()):
        assert partitioner.plan(six_layers(), [A, slow], Links(), num_microbatches=1).num_stages == 1
        assert partitioner.plan(six_layers(force=(2,)), [A, slow], Links(), num_microbatches=1).cuts == (3,)


def test_many_different_devices_keep_pins_and_forced_cuts() -> None:
    devices = [Device(f"d{index}", 1e11 * (1 + index), BIG) for index in range(30)]
    profile = six_layers(force=(3,), pins={0: "d7", 5: "d2"})
    plan = Exact(max_cells=1).plan(profile, devices, Links(), num_microbatches=8)
    assert 4 in plan.cuts
    assert (plan.stages[0].device, plan.stages[-1].device) == ("d7", "d2")


@pytest.mark.parametrize("schedule", ["v-shape", "interleaved"])
def test_rules_hold_where_a_device_has_several_stages(schedule: str) -> None:
    pins = {"v-shape": {0: "b", 5: "b"}, "interleaved": {0: "b", 5: "a"}}[schedule]
    profile = six_layers(force=(3,), pins=pins)
    best = Exact(schedule=schedule).plan(profile, [A, B], Links(), num_microbatches=4)
    assert best.placement in (((0, 3), (1, 2)), ((0, 2), (1, 3)))
    steps = []
    for cuts in itertools.combinations(range(1, 6), 3):
        for order in ([A, B], [B, A]):
            devices = [order[device] for device in place(schedule, 2, 4).device_of]
            with contextlib.suppress(PlanError):
                steps.append(
                    build_plan(profile, devices, cuts, Links(), num_microbatches=4, schedule=schedule).step_s
                )
    assert best.step_s == pytest.approx(min(steps), rel=1e-9)
    with pytest.raises(PlanError, match="keep.* the forced cuts and pinned layers"):
        Balanced(schedule=schedule).plan(profile, [A, B], Links(), num_microbatches=4)


def test_build_plan_refuses_a_broken_rule() -> None:
    with pytest.raises(PlanError, match="must be cut after layer 'l2', but layers 1 to 5 are one stage"):
        build_plan(six_layers(force=(2,)), [A, B], [1], Links(), num_microbatches=2)
    with pytest.raises(PlanError, match="layer 'l1' is to run on device 'b', not on 'a'"):
        build_plan(six_layers(pins={1: "b"}), [A, B], [2], Links(), num_microbatches=2)


def test_a_layer_that_must_be_cut_after_can_be() -> None:
    with pytest.raises(ValueError, match="layer 'x' must be cut after, but may not be"):
        LayerProfile(name="x", forward_s=1, backward_s=1, can_cut_after=False, must_cut_after=True)


@pytest.mark.parametrize("partitioner", [Uniform(), Balanced(), Exact()], ids=repr)
def test_the_built_in_partitioners_plan_the_contracts_cases_with_rules(partitioner: Partitioner) -> None:
    ruled = [case for case in contract_cases() if "forced" in case.name]
    assert len(ruled) == 2
    for case in ruled:
        partitioner.plan(case.profile, case.devices, case.links, num_microbatches=case.num_microbatches)
    check_partitioner(partitioner, ruled)
