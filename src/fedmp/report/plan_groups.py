"""What the tables and pictures of a plan have in common: clients grouped by equal plans, the slowest part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmp.records import Plan, StagePlan
from fedmp.report.units import format_range, format_seconds, format_share, shorten_layer

__all__ = [
    "Bottleneck",
    "PlanGroup",
    "bottleneck",
    "describe_cut",
    "describe_plan",
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
    """The part of a pipeline that takes longest for one micro-batch.

    Attributes:
        stage: index of the stage, or of the stage before the link.
        is_link: whether it is the link from that stage to the next, not the stage itself.
        busy_s: seconds it is busy with one micro-batch, both directions.
    """

    stage: int
    is_link: bool
    busy_s: float


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
    """Find the stage or link that is busy longest with one micro-batch.

    Args:
        plan: any plan.

    Returns:
        The slowest part; a stage where a link ties with it.
    """
    stages = [
        Bottleneck(index, False, stage.forward_s + stage.backward_s)
        for index, stage in enumerate(plan.stages)
    ]
    links = [
        Bottleneck(index, True, stage.send_s + stage.gradient_s)
        for index, stage in enumerate(plan.stages[:-1])
    ]
    return max([*stages, *links], key=lambda part: part.busy_s)


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
        Predicted step time, optimality gap where a bound is known, slowest part, unused devices.
    """
    slowest = bottleneck(plan)
    device = plan.stages[slowest.stage].device
    where = f"link from stage {slowest.stage} to {slowest.stage + 1}" if slowest.is_link else f"{device}"
    lines = [f"predicted step {format_seconds(plan.step_s)}"]
    if plan.bound_s > 0:
        is_best = plan.gap < 0.0005
        lines.append("proven optimal" if is_best else f"at most {format_share(plan.gap)} from optimal")
    if plan.num_stages > 1:
        lines.append(f"slowest: {where}")
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
