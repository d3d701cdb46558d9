"""What to say when nothing fits: the smallest change of the devices that would make it fit.

Only memory counts here, so devices that differ in speed or links alone are the same, and the search is a
dynamic program for the least bytes by which a stage exceeds its device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import ByteSize

from fedmp.errors import InfeasibleError, PlanError
from fedmp.partition.estimate import CostModel, format_bytes
from fedmp.partition.lattice import any_order, count_any_order, fixed_order
from fedmp.partition.problem import make_problem
from fedmp.partition.space import Space, told_apart
from fedmp.topology import Device, Links

__all__ = ["infeasible", "least_extra_bytes"]

_MAX_CELLS = 20_000_000  # of one dynamic program
_MAX_MORE = 8  # devices to try adding
_BOUNDLESS = ByteSize(1 << 60)


def infeasible(costs: CostModel, devices: Sequence[Device], schedule: str, *, in_order: bool) -> PlanError:
    """An error that says what would make a plan possible.

    Args:
        costs: of the model.
        devices: none of whose choices fits.
        schedule: that the plan was wanted for.
        in_order: whether the order of the devices is fixed.

    Returns:
        An `InfeasibleError`, or a `PlanError` if no amount of memory would help.
    """
    boundless = [Device(device.name, memory_bytes=_BOUNDLESS) for device in devices]
    if least_extra_bytes(costs, boundless, schedule, target=None, in_order=in_order) == np.inf:
        names = ", ".join(device.name for device in devices)
        return PlanError(
            f"no plan for the devices {names}{', in this order,' if in_order else ''} keeps the forced cuts and "
            f"pinned layers; change the rules{' or the order, or use the partitioner exact' if in_order else ''}"
        )
    ways_out = [_more_memory(costs, devices, schedule, in_order=in_order)]
    if in_order:
        ways_out.append(_other_order(costs, devices, schedule))
    else:
        ways_out.append(_more_devices(costs, devices, schedule))
    if schedule != "1f1b-short":
        ways_out.append("with the schedule '1f1b-short', if that holds fewer activations")
    if costs.microbatch_size > 1:
        ways_out.append(f"with a smaller micro-batch (now {costs.microbatch_size})")
    order = " in this order" if in_order else ""
    said = [way for way in ways_out if way]
    would = f"; it would {', or '.join(said)}" if said else ""
    return InfeasibleError(f"the model does not fit the {len(devices)} devices{order}{would}")


def least_extra_bytes(
    costs: CostModel, devices: Sequence[Device], schedule: str, *, target: int | None, in_order: bool
) -> float | None:
    """The least extra memory that makes a plan possible.

    Args:
        costs, devices, schedule, in_order: as for `infeasible`.
        target: index of the one device that gets it; None for no device, so that 0 means feasible.

    Returns:
        Bytes; infinite if no amount helps; None if the search would take too long.
    """
    alike = [_memory_only(device, is_target=index == target) for index, device in enumerate(devices)]
    problem = make_problem(costs, alike, Links(), merge_devices=not in_order)
    counts = [len(kind) for kind in problem.kinds]
    apart = told_apart(schedule, costs.num_microbatches)
    num_states = len(devices) * apart if in_order else int(count_any_order(counts)[-1])
    if num_states * (problem.num_units + 1) ** 2 > _MAX_CELLS:
        return None
    lattice = fixed_order(range(len(devices)), apart) if in_order else any_order(counts, problem.num_units)
    wanted = [kind for kind, members in enumerate(problem.kinds) if target in members]
    return _least_excess(Space(problem, lattice, schedule), wanted[0] if wanted else None)


def _least_excess(space: Space, target: int | None) -> float:
    problem, lattice = space.problem, space.lattice
    excess = np.full((lattice.num_states, problem.num_units + 1), np.inf)
    for group in lattice.groups:
        rest = excess[lattice.successors[group]]
        rest[lattice.successors[group] < 0] = np.inf
        after = rest.min(axis=1)
        after[lattice.may_end[group], -1] = 0.0
        for kind, behind, states in space.alike(group):
            limit = float(problem.device_of(kind).memory_bytes)
            over = np.maximum(problem.memory_bytes(space.in_flight(behind)) - limit, 0.0)
            over = over if kind == target else np.where(over > 0, np.inf, 0.0)
            over = np.where(problem.allows(kind), over, np.inf)
            for state in states:
                excess[state] = np.maximum(over, after[state - group.start]).min(axis=1)
    return float(excess[:, 0].min())


def _more_memory(costs: CostModel, devices: Sequence[Device], schedule: str, *, in_order: bool) -> str:
    """The one device that needs the least more."""
    targets: dict[object, int] = {}
    for index, device in enumerate(devices):
        targets.setdefault(index if in_order else device.memory_bytes, index)
    if len(targets) > 16:
        return ""
    found = [
        (extra, target)
        for target in targets.values()
        if (extra := least_extra_bytes(costs, devices, schedule, target=target, in_order=in_order))
        is not None
    ]
    if not found or not np.isfinite(min(found)[0]):
        return ""
    extra, target = min(found)
    device = devices[target]
    return (
        f"with {format_bytes(extra)} more on device {device.name!r} (now {format_bytes(device.memory_bytes)})"
    )


def _more_devices(costs: CostModel, devices: Sequence[Device], schedule: str) -> str:
    """How many more devices of the largest memory make it fit."""
    largest = max(devices, key=lambda device: device.memory_bytes)
    for count in range(1, _MAX_MORE + 1):
        more = [Device(f"{largest.name} {copy}", memory_bytes=largest.memory_bytes) for copy in range(count)]
        extra = least_extra_bytes(costs, [*devices, *more], schedule, target=None, in_order=False)
        if extra is None:
            return ""
        if extra == 0:
            noun = "device" if count == 1 else "devices"
            return f"with {count} more {noun} like {largest.name!r} ({format_bytes(largest.memory_bytes)})"
    return ""


def _other_order(costs: CostModel, devices: Sequence[Device], schedule: str) -> str:
    extra = least_extra_bytes(costs, devices, schedule, target=None, in_order=False)
    return "in another order, which the exact partitioner finds" if extra == 0 else ""


def _memory_only(device: Device, *, is_target: bool) -> Device:
    """Forget all but memory; the target's speed keeps it apart from other devices of its size."""
    return Device(device.name, flops_per_s=2.0 if is_target else 1.0, memory_bytes=device.memory_bytes)
