"""Tables for a terminal: who holds what data, how each model is cut, and how the run compares in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedmp.records import ClientData, Plan, StagePlan, Summary
from fedmp.report.closing import closing_rows
from fedmp.report.marks import bar, heat_cell, shade_strip
from fedmp.report.plan_groups import (
    Bottleneck,
    PlanGroup,
    bottleneck,
    describe_cut,
    describe_plan,
    group_plans,
    join_names,
    layers_text,
)
from fedmp.report.units import format_bytes, format_count, format_seconds, memory_unit, shorten, visible

__all__ = ["closing_table", "data_table", "plan_table", "plans_panel"]

_MAX_CLIENTS = 16
_MAX_LABEL_COLUMNS = 10
_MAX_PLANS = 3


def data_table(clients: Sequence[ClientData], label_names: Sequence[str] = ()) -> Table:
    """Samples and shares of the labels, one row a client.

    Up to ten labels get a column each with the share in percent; more labels become a strip with one
    shaded character each. Beyond 16 clients the first 15 are listed and the others summed up in one row.

    Args:
        clients: who holds what.
        label_names: names of the labels, in label order; numbers where there are none.

    Returns:
        The table, with a row for all clients together where there are several.
    """
    shown = _shown_clients(clients)
    num_labels = max((len(client.label_counts) for client in clients), default=0)
    names = [visible(label_names[i]) if i < len(label_names) else str(i) for i in range(num_labels)]
    table = _new_table("data", gap=0)
    table.add_column("client", no_wrap=True)
    table.add_column("samples", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    _add_label_columns(table, names)
    most = max((client.num_samples for client in clients), default=0)
    peak = max((share for client in shown for share in _shares(client, num_labels)), default=0.0)
    for client in shown:
        table.add_row(*_data_row(client, most, num_labels, peak))
    if len(clients) > 1:
        table.add_section()
        everyone = _pooled(f"all {len(clients)}", clients)
        table.add_row(*_data_row(everyone, 0, num_labels, peak), style="bold")
    return table


def plan_table(client_name: str, plan: Plan) -> Table:
    """A client's plan, one row a stage, its slowest part highlighted.

    Args:
        client_name: the client, or the clients that share the plan.
        plan: how the model is cut.

    Returns:
        The table; its caption has the predicted step time, the optimality gap and unused devices.
    """
    table = _new_table(f"plan of {client_name}", note=describe_cut(plan))
    table.add_column("", no_wrap=True)
    table.add_column("device", no_wrap=True)
    # The only column that may wrap, so that a narrow terminal costs no figures.
    table.add_column("layers", overflow="ellipsis", min_width=8)
    for name in ("weights", "fwd+bwd ms"):
        table.add_column(name, justify="right", no_wrap=True)
    size, unit = memory_unit(max(max(stage.memory_bytes, stage.device_memory_bytes) for stage in plan.stages))
    table.add_column(f"memory {unit}", no_wrap=True)
    for name in ("sends", "held"):
        table.add_column(name, justify="right", no_wrap=True)
    slowest = bottleneck(plan)
    for index in range(plan.num_stages):
        table.add_row(*_stage_row(plan, index, slowest, size))
    table.caption = Text(" · ".join(describe_plan(plan)), style="default")
    table.caption_justify = "left"
    return table


def plans_panel(plans: Mapping[str, Plan]) -> Panel:
    """All plans of a run; clients with equal plans share one table.

    Args:
        plans: by client name.

    Returns:
        A panel with the three most common plans in full and the others in a line each.
    """
    groups = group_plans(plans)
    parts: list[RenderableType] = []
    for group in groups[:_MAX_PLANS]:
        parts += [plan_table(join_names(group.clients, 3), group.plan), Text()]
    parts = parts[:-1]
    if len(groups) > _MAX_PLANS:
        parts += [Text(), _other_plans(groups[_MAX_PLANS:])]
    distinct = f"{len(groups)} distinct, " if len(groups) > 1 else ""
    title = f"plans ({distinct}{len(plans)} client{'s' if len(plans) != 1 else ''})"
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        box=box.HORIZONTALS,
        padding=0,
        border_style="bright_black",
    )


def closing_table(summary: Summary) -> Table:
    """The run against centralized training.

    Args:
        summary: the finished run.

    Returns:
        Accuracy, gap, samples, bytes and time; "not asked for" where no centralized training was run.
    """
    table = _new_table("federated against centralized")
    table.add_column("", no_wrap=True)
    table.add_column("federated", justify="right", no_wrap=True)
    table.add_column("centralized", justify="right", no_wrap=True)
    for row in closing_rows(summary):
        is_missing = row.centralized.startswith("not ")
        centralized = Text(row.centralized, style="bright_black" if is_missing else "")
        label = f"  {row.label}" if row.is_detail else row.label
        style = "bold" if row.label in ("test accuracy", "gap") else "dim" if row.is_detail else ""
        table.add_row(Text(label), Text(row.federated), centralized, style=style)
    return table


def _new_table(title: str, note: str = "", gap: int = 1) -> Table:
    heading = Text(title, style="bold")
    if note:
        heading.append(f"  {note}", style="not bold bright_black")
    return Table(
        title=heading,
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        header_style="bright_black",
        pad_edge=False,
        padding=(0, gap, 0, 0),
    )


def _shown_clients(clients: Sequence[ClientData]) -> list[ClientData]:
    if len(clients) <= _MAX_CLIENTS:
        return list(clients)
    others = clients[_MAX_CLIENTS - 1 :]
    return [*clients[: _MAX_CLIENTS - 1], _pooled(f"{len(others)} others", others)]


def _pooled(name: str, clients: Sequence[ClientData]) -> ClientData:
    num_labels = max(len(client.label_counts) for client in clients)
    columns = ([c.label_counts[i] for c in clients if i < len(c.label_counts)] for i in range(num_labels))
    return ClientData(name, sum(c.num_samples for c in clients), tuple(sum(column) for column in columns))


def _add_label_columns(table: Table, names: Sequence[str]) -> None:
    if not names:
        return
    if len(names) > _MAX_LABEL_COLUMNS:
        table.add_column(Text(f"labels {names[0]} .. {names[-1]} ({len(names)})"), no_wrap=True)
        return
    short = [name[:4] for name in names]
    is_clear = len(set(short)) == len(short)
    for index, name in enumerate(short):
        table.add_column(Text(name if is_clear else str(index)), justify="right", no_wrap=True)
    if any(len(name) > 4 for name in names):
        numbered = names if is_clear else [f"{index} {name}" for index, name in enumerate(names)]
        table.caption = Text(
            "percent of the client's samples; labels: " + ", ".join(numbered), style="bright_black"
        )
    else:
        table.caption = Text("percent of the client's samples by label", style="bright_black")
    table.caption_justify = "left"


def _shares(client: ClientData, num_labels: int) -> list[float]:
    total = sum(client.label_counts)
    counts = [*client.label_counts, *[0] * (num_labels - len(client.label_counts))]
    return [count / total if total else 0.0 for count in counts]


def _data_row(client: ClientData, most: int, num_labels: int, peak: float) -> list[RenderableType]:
    shares = _shares(client, num_labels)
    # A row that sums several clients up has no bar: beside the others' it would only dwarf them.
    is_one = most > 0 and client.num_samples <= most
    row: list[RenderableType] = [
        Text(shorten(client.name, 20)),
        Text(format_count(client.num_samples)),
        bar(client.num_samples / most, 6) if is_one else Text(),
    ]
    if num_labels > _MAX_LABEL_COLUMNS:
        return [*row, shade_strip(shares, 40, peak or 1.0)]
    return [*row, *(heat_cell(share, peak or 1.0) for share in shares)]


def _stage_row(plan: Plan, index: int, slowest: Bottleneck, unit_bytes: float) -> list[RenderableType]:
    stage = plan.stages[index]
    is_slowest = slowest.is_stage(index) and plan.num_devices > 1
    is_slow_link = slowest.is_link_after(index)
    style = "bold yellow" if is_slowest else ""
    times = f"{stage.forward_s * 1e3:.3g}+{stage.backward_s * 1e3:.3g}"
    stays = index == plan.num_stages - 1 or plan.stages[index + 1].device == stage.device
    sends = "-" if stays else format_bytes(stage.boundary_bytes)
    return [
        Text(f"{'▶' if is_slowest else ' '} {index}", style=style),
        Text(shorten(stage.device, 18), style=style),
        Text(layers_text(plan, stage)),
        Text(format_bytes(stage.parameter_bytes)),
        Text(times, style=style),
        _memory(stage, unit_bytes),
        Text(sends, style="bold yellow" if is_slow_link else ""),
        Text(str(stage.in_flight)),
    ]


def _memory(stage: StagePlan, unit_bytes: float) -> Text:
    used = f"{stage.memory_bytes / unit_bytes:.1f}"
    if stage.device_memory_bytes <= 0:
        return Text(used)
    share = stage.memory_bytes / stage.device_memory_bytes
    style = "red" if share > 0.9 else "cyan"
    return bar(share, 5, style).append(
        f" {used}/{stage.device_memory_bytes / unit_bytes:.1f}", style="default"
    )


def _other_plans(groups: Sequence[PlanGroup]) -> Table:
    table = _new_table(f"{len(groups)} other plans")
    table.add_column("clients", no_wrap=True, overflow="ellipsis")
    table.add_column("stages", justify="right", no_wrap=True)
    table.add_column("layers of each", overflow="ellipsis")
    table.add_column("predicted step", justify="right", no_wrap=True)
    shown = groups if len(groups) <= 8 else groups[:7]
    for group in shown:
        layers = " | ".join(str(stage.stop - stage.start) for stage in group.plan.stages)
        table.add_row(
            Text(join_names(group.clients, 3)),
            str(group.plan.num_stages),
            layers,
            format_seconds(group.plan.step_s),
        )
    rest = groups[len(shown) :]
    if rest:
        steps = [group.plan.step_s for group in rest]
        span = f"{format_seconds(min(steps))} to {format_seconds(max(steps))}"
        table.add_row(f"and {sum(len(group.clients) for group in rest)} more", "", "", span)
    return table
