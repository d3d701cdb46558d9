"""`build_plan` and the cost model by hand, and what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmp.errors import InfeasibleError, PlanError
from fedmp.partition import build_plan, cost_model
from fedmp.partition.estimate import format_bytes
from fedmp.records import LayerProfile, Plan, Profile
from fedmp.topology import Device, Link, Links
from tests.partition.instances import random_instance

LINKS = Links(default=Link(1000.0, 0.5), pairs={"b,a": Link(100.0, 0.0)})
BIG = 1 << 40


def three_layers(**changes: object) -> Profile:
    """Layers a, b, c that share `tied` between the first and the last."""
    layers = [
        LayerProfile(
            name=name,
            forward_s=1.0,
            backward_s=2.0,
            parameters=("tied", f"{name}.w") if name != "b" else ("b.w",),
            buffer_bytes=3,
            activation_bytes=5.0,
            workspace_bytes=7.0 if name != "b" else 9.0,
            reused_bytes=4.0,
            boundary_bytes=10.0,
            gradient_bytes=20.0,
            can_cut_after=name != "b",
        )
        for name in "abc"
    ]
    values = {
        "layers": tuple(layers),
        "parameter_bytes": {"tied": 1000, "a.w": 100, "b.w": 10, "c.w": 1},
        "reference_flops_per_s": 1e9,
        "batch_size": 10,
        "optimizer_copies": 2.0,
        "process_bytes": 50,
        "update_s_per_byte": 4e-3,
    }
    return Profile.model_validate({**values, **changes})


def test_predictions_by_hand() -> None:
    devices = [Device("a", 1e9, BIG), Device("b", 4e9, BIG)]
    plan = build_plan(three_layers(), devices, [1], LINKS, num_microbatches=4, schedule="1f1b-short")
    first, second = plan.stages
    assert plan.microbatch_size == 3  # 10 samples in 4 micro-batches, rounded up
    # a quarter of the optimizer's step for each micro-batch; device b is four times as fast
    assert (first.forward_s, first.backward_s) == pytest.approx((3.0, 6.0 + 4e-3 * 1100 / 4))
    assert (second.forward_s, second.backward_s) == pytest.approx((3 * 2 / 4, (3 * 4 + 4e-3 * 1011 / 4) / 4))
    assert (first.send_s, first.gradient_s, first.boundary_bytes) == (0.3, 0.6, 30.0)
    assert (second.send_s, second.gradient_s, second.boundary_bytes) == (0.0, 0.0, 0.0)
    assert (first.in_flight, second.in_flight) == (2, 1)
    assert (first.parameter_bytes, second.parameter_bytes) == (1100, 1011)
    # weights + gradients + 2 copies, buffers, activations in flight, workspace, frames, the process
    assert first.memory_bytes == 4 * 1100 + 3 + 2 * 3 * 5 + 3 * 7 + (3 * 30 + 2 * 60) + 50
    assert second.memory_bytes == 4 * 1011 + 6 + 1 * 3 * (10 - 4) + 3 * 7 + (2 * 30 + 4 * 60) + 50
    assert plan.cuts == (1,)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_shared_parameter_counts_once_in_a_stage() -> None:
    plan = build_plan(three_layers(), [Device("a", 1e9, BIG)], [], LINKS, num_microbatches=1)
    assert plan.stages[0].parameter_bytes == 1111


@given(st.integers(0, 300))
def test_parameter_matrix_agrees_with_counting_names(seed: int) -> None:
    costs = cost_model(random_instance(seed).profile, 2)
    positions = costs.positions()
    matrix = costs.parameter_matrix(positions)
    for first, start in enumerate(positions):
        for end, stop in enumerate(positions):
            assert matrix[first, end] == (costs.parameter_bytes(start, stop) if first < end else 0)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([2], r"may not be cut after layer 'b' \(cut 2\)"),
        ([0], "must increase and lie between 1 and 2"),
        ([3], "must increase and lie between 1 and 2"),
        ([], "2 stages need 1 cuts, not 0"),
    ],
)
def test_bad_cuts_are_refused(cuts: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build_plan(three_layers(), [Device("a"), Device("b")], cuts, LINKS, num_microbatches=2)


def test_more_stages_than_layers_are_refused() -> None:
    devices = [Device(f"d{index}") for index in range(8)]
    with pytest.raises(PlanError, match="8 stages asked for, but the model has only 3 layers"):
        build_plan(three_layers(), devices, range(1, 8), LINKS, num_microbatches=2)


def test_bad_devices_are_refused() -> None:
    with pytest.raises(PlanError, match="no devices"):
        build_plan(three_layers(), [], [], LINKS, num_microbatches=2)
    with pytest.raises(PlanError, match="a occurs twice"):
        build_plan(three_layers(), [Device("a"), Device("a")], [1], LINKS, num_microbatches=2)


def test_a_stage_larger_than_its_device_is_refused_with_need_limit_and_way_out() -> None:
    profile = three_layers(parameter_bytes={"tied": 1 << 30, "a.w": 1 << 28, "b.w": 10, "c.w": 1})
    devices = [Device("big", 1e9, "6 GiB"), Device("nano-3", 1e9, "4 GiB")]
    with pytest.raises(InfeasibleError) as error:
        build_plan(profile, devices[::-1], [1], LINKS, num_microbatches=2)
    assert str(error.value) == (
        "stage 0 needs 5.0 GiB but device 'nano-3' has 4.0 GiB; "
        "use more stages, the schedule '1f1b-short' or a smaller micro-batch (now 5)"
    )


def test_a_difference_too_small_to_show_is_shown_in_bytes() -> None:
    profile = three_layers(parameter_bytes={"tied": 1 << 30, "a.w": 0, "b.w": 0, "c.w": 0})
    with pytest.raises(InfeasibleError, match=r"needs 4,294,967,399 B but device 'a' has 4,294,967,296 B"):
        build_plan(profile, [Device("a", 1e9, "4 GiB")], [], LINKS, num_microbatches=5, schedule="1f1b-short")


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_microbatches is 0"):
        cost_model(three_layers(), 0)
    with pytest.raises(ValueError, match=r"uses parameter 'tied', which has no entry"):
        cost_model(three_layers(parameter_bytes={"a.w": 1}), 1)
    with pytest.raises(ValueError, match="unknown schedule 'zigzag'"):
        build_plan(three_layers(), [Device("a")], [], LINKS, num_microbatches=1, schedule="zigzag")


def test_bytes_are_shown_in_binary_units() -> None:
    assert [format_bytes(size) for size in (0, 1023, 1536, 5.1 * (1 << 30))] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.1 GiB",
    ]
