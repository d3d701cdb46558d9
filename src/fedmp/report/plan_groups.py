"""What the tables and pictures of a plan have in common: clients grouped by equal plans, the slowest part."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmp.records import Plan, StagePlan
from fedmp.report.units import format_memory, format_range, format_seconds, format_share, shorten_layer

__all__ = [
    "Bottleneck",
    "PlanGroup",
    "bottleneck",
    "describe_cut",
    "describe_plan",
    "fullest_device",
    "group_plans",
    "join_names",
    "layers_text",
]


@dataclass(frozen=True)
class PlanGroup:
    """Clients whose plans are equal.

    Attributes:
        clients: their names, in the order of the run.
        plan: the plan that they share.
    """

    clients: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Bottleneck:
    """The device or link of a pipeline that takes longest for one micro-batch.

    Attributes:
        stages: of the device; or those before the link, one for each boundary that goes over it.
        is_link: whether it is the link from those stages to the next ones, not the device.
        busy_s: seconds it is busy with one micro-batch, both directions.
    """

    stages: tuple[int, ...]
    is_link: bool
    busy_s: float

    def is_stage(self, index: int) -> bool:
        """Whether this stage is on the slowest device."""
        return not self.is_link and index in self.stages

    def is_link_after(self, index: int) -> bool:
        """Whether the link behind this stage is the slowest part."""
        return self.is_link and index in self.stages


def group_plans(plans: Mapping[str, Plan]) -> list[PlanGroup]:
    """Group clients whose plans are equal, the largest group first.

    Args:
        plans: by client name, in the order of the run.

    Returns:
        The groups; those of equal size in order of their first client.
    """
    groups: dict[str, list[str]] = {}
    for client, plan in plans.items():
        groups.setdefault(plan.model_dump_json(), []).append(client)
    found = [PlanGroup(tuple(clients), plans[clients[0]]) for clients in groups.values()]
    return sorted(found, key=lambda group: -len(group.clients))


def bottleneck(plan: Plan) -> Bottleneck:
    """Find the device or link that is busy longest with one micro-batch.

    Args:
        plan: any plan.

    Returns:
        The slowest part; a device where a link ties with it.
    """
    stages = plan.stages
    devices = [
        Bottleneck(own, False, sum(stages[index].forward_s + stages[index].backward_s for index in own))
        for own in plan.placement
    ]
    between: dict[frozenset[str], tuple[int, ...]] = {}
    for index, (stage, after) in enumerate(itertools.pairwise(stages)):
        if stage.device != after.device:
            ends = frozenset((stage.device, after.device))
            between[ends] = (*between.get(ends, ()), index)
    links = [
        Bottleneck(before, True, sum(stages[index].send_s + stages[index].gradient_s for index in before))
        for before in between.values()
    ]
    return max([*devices, *links], key=lambda part: part.busy_s)


def fullest_device(plan: Plan) -> tuple[str, int, int]:
    """The device whose memory is used the most, by share: its name, what its stages need, what it has."""
    used = []
    for name, own in zip(plan.devices, plan.placement, strict=True):
        needed = sum(plan.stages[index].memory_bytes for index in own)
        used.append((name, needed, plan.stages[own[0]].device_memory_bytes))
    return max(used, key=lambda row: row[1] / max(row[2], 1))


def layers_text(plan: Plan, stage: StagePlan, name_width: int = 24, mark: str = "…") -> str:
    """Name a stage's layers by their number, first and last.

    Args:
        plan: the plan of the stage.
        stage: one of its stages.
        name_width: the most characters of one name.
        mark: stands for what is cut out of a longer one.

    Returns:
        Such as `"5: embed .. block.3"`.
    """
    names = plan.layer_names[stage.start : stage.stop]
    ends = tuple(shorten_layer(name, name_width, mark) for name in (names[:1] + names[1:][-1:]))
    return f"{len(names)}: {format_range(ends)}"


def describe_cut(plan: Plan) -> str:
    """Say how a plan was made and how it cuts a batch.

    Args:
        plan: any plan.

    Returns:
        Such as `"balanced, 1f1b, 8 micro-batches of 4"`.
    """
    sizes = f"{plan.num_microbatches} micro-batch{'es' if plan.num_microbatches > 1 else ''}"
    return f"{plan.partitioner}, {plan.schedule}, {sizes} of {plan.microbatch_size}"


def describe_plan(plan: Plan) -> list[str]:
    """Say what a plan promises, one statement each.

    Args:
        plan: any plan.

    Returns:
        Predicted step time, optimality gap where a bound is known, slowest part, unused devices; the fullest
        device, where devices run several stages.
    """
    slowest = bottleneck(plan)
    first = slowest.stages[0]
    device, after = plan.stages[first].device, plan.stages[min(first + 1, plan.num_stages - 1)].device
    link = f"link from stage {first} to {first + 1}"
    if len(slowest.stages) > 1:
        link = f"links between {device} and {after}"
    where = link if slowest.is_link else device
    lines = [f"predicted step {format_seconds(plan.step_s)}"]
    if plan.bound_s > 0:
        is_best = plan.gap < 0.0005
        lines.append("proven optimal" if is_best else f"at most {format_share(plan.gap)} from optimal")
    if plan.num_stages > 1:
        lines.append(f"slowest: {where}")
    if plan.num_devices < plan.num_stages:
        name, needed, limit = fullest_device(plan)
        lines.append(f"fullest: {name}, {format_memory(needed)} of {format_memory(limit)}")
    if plan.unused_devices:
        lines.append(f"unused: {join_names(plan.unused_devices, 4)}")
    return lines


def join_names(names: Sequence[str], limit: int) -> str:
    """List names, and count those beyond a limit.

    Args:
        names: at least one.
        limit: names to list where not all are, at least 1.

    Returns:
        Such as `"lab-a, lab-b and 48 more"`.
    """
    # "and 1 more" would be no shorter than the name.
    if len(names) <= limit + 1:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"
