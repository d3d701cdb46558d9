"""From a choice of cuts and devices to a complete `Plan`, with every prediction filled in and checked.

All partitioners, built in or a user's own, end here, so a plan means the same whoever made it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fedmp.errors import InfeasibleError, PlanError
from fedmp.partition.estimate import CostModel, cost_model, format_bytes
from fedmp.partition.events import StageTimes, step_s
from fedmp.partition.placed_events import Placed, place, simulate_placed
from fedmp.partition.rules import check_stages
from fedmp.records import Plan, Profile, StagePlan
from fedmp.schedule import peak_in_flight, placed_schedule_by_name, schedule_by_name
from fedmp.topology import Device, Links

__all__ = ["build_plan", "check_devices"]


def build_plan(
    profile: Profile,
    devices_in_order: Sequence[Device],
    cuts: Sequence[int],
    links: Links,
    *,
    num_microbatches: int,
    schedule: str = "1f1b",
    partitioner: str = "custom",
    bound_s: float = 0.0,
    unused_devices: Sequence[str] = (),
) -> Plan:
    """Predict times and memory of a choice of cuts and devices, and check that it can run.

    Args:
        profile: what each layer costs.
        devices_in_order: the device of the first stage, of the second, and so on. One may occur several
            times, as the schedule places its stages.
        cuts: the layers that start the second stage, the third, and so on; one fewer than stages.
        links: between the devices.
        num_microbatches: how many micro-batches one batch is cut into.
        schedule: name of a built-in one.
        partitioner: name of what chose, for reports.
        bound_s: seconds that no plan can be faster than; 0 if unknown.
        unused_devices: names of devices that were left out, for reports.

    Returns:
        The plan, with the predicted seconds of one step in `step_s`.

    Raises:
        PlanError: the cuts do not increase, are forbidden, do not fit the number of devices or layers, or
            do not keep a forced cut or a layer's device.
        InfeasibleError: a stage needs more memory than its device has.
        ValueError: the schedule's name or the number of micro-batches is wrong.

    Example:
        >>> plan = build_plan(profile, devices[:2], [3], links, num_microbatches=8)  # doctest: +SKIP
        >>> plan.stages[0].stop  # doctest: +SKIP
        3
    """
    placed = _placed(devices_in_order, schedule, num_microbatches)
    if placed is None:
        check_devices(devices_in_order)
    check_cuts(profile, cuts, len(devices_in_order))
    costs = cost_model(profile, num_microbatches)
    in_flight = placed.in_flight if placed else _in_flight(schedule, len(devices_in_order), num_microbatches)
    edges = [0, *cuts, costs.num_layers]
    check_stages(profile, edges, [device.name for device in devices_in_order])
    stages = [
        _stage_plan(costs, devices_in_order, edges, links, stage, in_flight[stage])
        for stage in range(len(devices_in_order))
    ]
    _check_memory(stages, costs.microbatch_size, schedule)
    if placed:
        seconds = simulate_placed(stage_times(stages), placed.actions, placed.placement)
    else:
        seconds = step_s(stage_times(stages), schedule, num_microbatches)
    return Plan(
        layer_names=tuple(layer.name for layer in profile.layers),
        stages=tuple(stages),
        partitioner=partitioner,
        schedule=schedule,
        num_microbatches=num_microbatches,
        microbatch_size=costs.microbatch_size,
        step_s=seconds,
        bound_s=min(bound_s, seconds),
        unused_devices=tuple(unused_devices),
        fingerprint=profile.fingerprint,
    )


def _placed(devices: Sequence[Device], schedule: str, num_microbatches: int) -> Placed | None:
    """The layout of a schedule that gives a device several stages; None for one that does not."""
    if placed_schedule_by_name(schedule) is None:
        return None
    names = [device.name for device in devices]
    used = list(dict.fromkeys(names))
    placed = place(schedule, max(len(used), 1), num_microbatches)
    expected = [used[device] for device in placed.device_of] if used else []
    if not used or names != expected:
        raise PlanError(
            f"schedule {schedule!r} places its stages on {', '.join(expected) or 'at least one device'}, in this "
            f"order, not on {', '.join(names) or 'none'}"
        )
    return placed


def _in_flight(schedule: str, num_stages: int, num_microbatches: int) -> tuple[int, ...]:
    actions = schedule_by_name(schedule).actions(num_stages, num_microbatches)
    return tuple(peak_in_flight(listed) for listed in actions)


def stage_times(stages: Sequence[StagePlan]) -> StageTimes[float]:
    """What the event simulator needs to know about a plan's stages."""
    return StageTimes(
        forward_s=[stage.forward_s for stage in stages],
        backward_s=[stage.backward_s for stage in stages],
        send_s=[stage.send_s for stage in stages[:-1]],
        gradient_s=[stage.gradient_s for stage in stages[:-1]],
    )


def check_devices(devices: Sequence[Device]) -> None:
    """Refuse an empty list of devices and devices of the same name.

    Raises:
        PlanError: there is no device, or a name occurs twice.
    """
    if not devices:
        raise PlanError("no devices to plan for; give at least one")
    names = [device.name for device in devices]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(
            f"a device holds one stage and has a name of its own, but {', '.join(twice)} occurs twice"
        )


def check_cuts(profile: Profile, cuts: Sequence[int], num_stages: int) -> None:
    """Refuse cuts that do not make `num_stages` stages of at least one layer at places that may be cut.

    Raises:
        PlanError: see above; the message names the cut.
    """
    num_layers = len(profile.layers)
    if num_stages > num_layers:
        raise PlanError(f"{num_stages} stages asked for, but the model has only {num_layers} layers")
    if len(cuts) != num_stages - 1:
        raise PlanError(f"{num_stages} stages need {num_stages - 1} cuts, not {len(cuts)}")
    edges = [0, *cuts, num_layers]
    if any(after <= before for before, after in itertools.pairwise(edges)):
        raise PlanError(
            f"cuts {list(cuts)} must increase and lie between 1 and {num_layers - 1}, "
            "so that every stage has at least one layer"
        )
    for cut in cuts:
        layer = profile.layers[cut - 1]
        if not layer.can_cut_after:
            raise PlanError(f"the model may not be cut after layer {layer.name!r} (cut {cut}); cut elsewhere")


def _stage_plan(
    costs: CostModel,
    devices: Sequence[Device],
    edges: Sequence[int],
    links: Links,
    stage: int,
    in_flight: int,
) -> StagePlan:
    device, start, stop = devices[stage], edges[stage], edges[stage + 1]
    send = gradient = boundary_bytes = 0.0  # as it stays where the next stage is on the same device
    if stage + 1 < len(devices) and device.name != devices[stage + 1].name:
        link = links.between(device.name, devices[stage + 1].name)
        send, gradient = float(costs.send_s(stop, link)), float(costs.gradient_s(stop, link))
        boundary_bytes = float(costs.boundary_bytes(stop))
    parameter_bytes = costs.parameter_bytes(start, stop)
    memory_bytes = float(costs.memory_bytes(start, stop, in_flight, parameter_bytes))
    return StagePlan(
        device=device.name,
        start=start,
        stop=stop,
        forward_s=float(costs.forward_s(start, stop, device)),
        backward_s=float(costs.backward_s(start, stop, device)),
        send_s=send,
        gradient_s=gradient,
        boundary_bytes=boundary_bytes,
        parameter_bytes=parameter_bytes,
        memory_bytes=-int(-memory_bytes // 1),
        device_memory_bytes=int(device.memory_bytes),
        in_flight=in_flight,
    )


def _check_memory(stages: Sequence[StagePlan], microbatch_size: int, schedule: str) -> None:
    for device in dict.fromkeys(stage.device for stage in stages):
        own = [index for index, stage in enumerate(stages) if stage.device == device]
        needed_bytes = sum(stages[index].memory_bytes for index in own)
        limit_bytes = stages[own[0]].device_memory_bytes
        if needed_bytes > limit_bytes:
            needed, limit = format_bytes(needed_bytes), format_bytes(limit_bytes)
            if needed == limit:
                needed, limit = f"{needed_bytes:,} B", f"{limit_bytes:,} B"
            who = f"stage {own[0]} needs" if len(own) == 1 else f"stages {', '.join(map(str, own))} need"
            raise InfeasibleError(
                f"{who} {needed} but device {device!r} has {limit}; {_way_out(microbatch_size, schedule)}"
            )


def _way_out(microbatch_size: int, schedule: str) -> str:
    fewer = "" if schedule == "1f1b-short" else ", the schedule '1f1b-short'"
    if microbatch_size == 1:
        return f"use more stages{fewer} or a device with more memory"
    return f"use more stages{fewer} or a smaller micro-batch (now {microbatch_size})"
