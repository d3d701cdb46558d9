"""What every partitioner must do, as one function that a user's own tests can call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import ByteSize

from fedmp.errors import PlanError
from fedmp.partition.build import build_plan
from fedmp.partition.partitioner import Partitioner
from fedmp.records import LayerProfile, Plan, Profile
from fedmp.schedule import placed_schedule_by_name
from fedmp.topology import Device, Link, Links

__all__ = ["Case", "check_partitioner", "contract_cases"]


@dataclass(frozen=True)
class Case:
    """A planning problem of the contract.

    Attributes:
        name: shown when a check fails.
        profile, devices, links, num_microbatches: the arguments of `plan`.
        is_roomy: whether every device can hold the whole model, so that a plan must be found.
    """

    name: str
    profile: Profile
    devices: tuple[Device, ...]
    links: Links
    num_microbatches: int
    is_roomy: bool


def check_partitioner(partitioner: Partitioner, cases: Sequence[Case] | None = None) -> None:
    """Run a partitioner over problems of many kinds and check all that fedmp relies on.

    Each layer is in one stage; cuts are where they are allowed and forced; pinned layers are on their devices;
    devices are known and have the stages that the schedule gives them, and the others are named as unused;
    every device's stages fit its memory; the predicted times are those of `build_plan`; the same input gives
    the same plan; and the plan survives JSON. Where nothing fits, the model is too small for the partitioner,
    or it does not know forced cuts and pinned layers, it must raise `PlanError` (or `InfeasibleError`), as
    `build_plan` does.

    Args:
        partitioner: any object with a `plan` method.
        cases: problems to use; by default those of `contract_cases`.

    Raises:
        AssertionError: the partitioner breaks a rule; the message names the case and the rule.

    Example:
        >>> from fedmp.partition import Uniform
        >>> check_partitioner(Uniform())
    """
    for case in contract_cases() if cases is None else cases:
        _check_case(partitioner, case)


def contract_cases() -> list[Case]:
    """The problems of the contract: alike and unlike devices, tight memory, cut rules, tied weights."""
    even = _profile(12)
    whole = 3 * sum(even.parameter_bytes.values())
    roomy = [_device(f"d{index}", 1.0, 64 << 30) for index in range(4)]
    uneven = [_device(f"u{index}", 1.0 + 3.0 * index, 64 << 30) for index in range(3)]
    slow = Links(default=Link(1.25e8, 1e-4), pairs={"u0,u1": Link(1e6, 1e-2)})
    tight = [_device(f"t{index}", 3.0 - index, whole * share // 10) for index, share in enumerate((9, 6, 2))]
    tiny = [_device(f"tiny{index}", 1.0, 1000) for index in range(3)]
    forced = _ruled(even, must_cut_after=(0, 4))
    pinned = _ruled(forced, devices={1: "u1", 11: "u2"})
    return [
        Case("equal devices", even, tuple(roomy), Links(), 8, True),
        Case("one device", even, tuple(roomy[:1]), Links(), 4, True),
        Case("one micro-batch", even, tuple(roomy[:3]), Links(), 1, True),
        Case("unequal devices and a slow link", even, tuple(uneven), slow, 8, True),
        Case("unequal layers, some cuts forbidden", _profile(15, seed=1), tuple(uneven), slow, 5, True),
        Case("memory that binds", even, tuple(tight), Links(), 8, False),
        Case("memory that binds, reversed", even, tuple(tight[::-1]), Links(), 16, False),
        Case("nothing fits", even, tuple(tiny), Links(), 8, False),
        Case("fewer layers than devices", _profile(2), tuple(roomy), Links(), 8, False),
        Case("one layer", _profile(1), tuple(roomy[:2]), Links(), 2, False),
        Case("forced cuts", forced, tuple(roomy), Links(), 4, False),
        Case("forced cuts and pinned layers", pinned, tuple(uneven), slow, 8, False),
    ]


def _device(name: str, speed: float, memory_bytes: int) -> Device:
    return Device(name, speed * 1e11, ByteSize(memory_bytes))


def _profile(num_layers: int, seed: int | None = None) -> Profile:
    """Equal layers; with a seed unequal ones, some cuts forbidden, the first and last layer tied."""
    rng = np.random.default_rng(seed)
    scale = np.ones(num_layers) if seed is None else rng.uniform(0.2, 3.0, num_layers)
    cuttable = [seed is None or index % 3 != 1 for index in range(num_layers)]
    layers = [
        LayerProfile(
            name=f"blocks.{index}",
            forward_s=1e-3 * float(size),
            backward_s=2e-3 * float(size),
            parameters=(f"blocks.{index}.weight",),
            buffer_bytes=64,
            activation_bytes=2e4 * float(size),
            boundary_bytes=1e4,
            gradient_bytes=1e4,
            can_cut_after=cuttable[index],
        )
        for index, size in enumerate(scale)
    ]
    if seed is not None:
        layers[-1] = layers[-1].model_copy(update={"parameters": layers[0].parameters})
    names = {name for layer in layers for name in layer.parameters}
    return Profile(
        layers=tuple(layers),
        parameter_bytes=dict.fromkeys(sorted(names), 4_000_000),
        reference_flops_per_s=1e11,
        batch_size=32,
    )


def _ruled(
    profile: Profile, must_cut_after: Sequence[int] = (), devices: Mapping[int, str] | None = None
) -> Profile:
    """The same layers, some of them to be cut after or pinned to devices."""
    layers = list(profile.layers)
    for index in must_cut_after:
        layers[index] = layers[index].model_copy(update={"must_cut_after": True})
    for index, device in (devices or {}).items():
        layers[index] = layers[index].model_copy(update={"device": device})
    return profile.model_copy(update={"layers": tuple(layers)})


def _check_case(partitioner: Partitioner, case: Case) -> None:
    try:
        plan = _plan(partitioner, case)
    except PlanError as error:
        if case.is_roomy:
            raise AssertionError(
                f"{case.name}: every device can hold the whole model, but plan() raised"
            ) from error
        return
    assert isinstance(plan, Plan), f"{case.name}: plan() must return a Plan, not {type(plan).__name__}"
    _check_layers(plan, case)
    _check_devices(plan, case)
    _check_predictions(plan, case)
    assert _plan(partitioner, case) == plan, (
        f"{case.name}: the same arguments gave another plan the second time"
    )
    assert Plan.model_validate_json(plan.model_dump_json()) == plan, (
        f"{case.name}: the plan changes through JSON"
    )


def _plan(partitioner: Partitioner, case: Case) -> Plan:
    return partitioner.plan(case.profile, case.devices, case.links, num_microbatches=case.num_microbatches)


def _check_layers(plan: Plan, case: Case) -> None:
    names = tuple(layer.name for layer in case.profile.layers)
    assert plan.layer_names == names, f"{case.name}: layer_names must be the profile's"
    held = [index for stage in plan.stages for index in range(stage.start, stage.stop)]
    assert held == list(range(len(names))), (
        f"{case.name}: each layer must be in one stage, in order; got {held}"
    )
    assert plan.num_microbatches == case.num_microbatches, (
        f"{case.name}: num_microbatches is not what was asked"
    )


def _check_devices(plan: Plan, case: Case) -> None:
    used, known = list(plan.devices), [device.name for device in case.devices]
    assert set(used) <= set(known), f"{case.name}: unknown devices {sorted(set(used) - set(known))}"
    placed = placed_schedule_by_name(plan.schedule)
    expected = tuple((i,) for i in range(len(used))) if placed is None else placed.placement(len(used))
    assert plan.placement == expected, (
        f"{case.name}: the schedule {plan.schedule!r} places stages {expected} on its devices, not {plan.placement}"
    )
    unused = set(known) - set(used)
    assert set(plan.unused_devices) == unused, f"{case.name}: give build_plan unused_devices={sorted(unused)}"
    for name, stages in zip(used, plan.placement, strict=True):
        limit = next(int(device.memory_bytes) for device in case.devices if device.name == name)
        needed = sum(plan.stages[index].memory_bytes for index in stages)
        assert needed <= limit, (
            f"{case.name}: stage {', '.join(map(str, stages))} does not fit; raise InfeasibleError"
        )


def _check_predictions(plan: Plan, case: Case) -> None:
    by_name = {device.name: device for device in case.devices}
    again = build_plan(
        case.profile,
        [by_name[stage.device] for stage in plan.stages],
        plan.cuts,
        case.links,
        num_microbatches=case.num_microbatches,
        schedule=plan.schedule,
    )
    assert plan.stages == again.stages, f"{case.name}: the stages' predictions differ from build_plan's"
    assert abs(plan.step_s - again.step_s) <= 1e-9 * again.step_s, (
        f"{case.name}: step_s is {plan.step_s}, but build_plan predicts {again.step_s}"
    )
    assert plan.bound_s <= plan.step_s, f"{case.name}: bound_s must not be above step_s"
