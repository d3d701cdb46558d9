"""A run as plain lines for logs and pipes: no escape codes, no redrawing, one line a round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import IO

from fedmp.records import (
    ClientData,
    Plan,
    RoundRecord,
    RunStarted,
    Summary,
)
from fedmp.report.closing import closing_rows
from fedmp.report.plan_groups import (
    PlanGroup,
    describe_cut,
    describe_plan,
    group_plans,
    join_names,
    layers_text,
)
from fedmp.report.units import (
    format_bytes,
    format_count,
    format_loss,
    format_memory,
    format_seconds,
    format_share,
    printable,
)

__all__ = ["closing_lines", "data_lines", "plan_lines", "round_line", "start_lines", "write_lines"]

_MAX_CLIENTS = 8
_MAX_PLANS = 4


def data_lines(clients: Sequence[ClientData]) -> list[str]:
    """Sum up who holds what.

    Args:
        clients: who holds what.

    Returns:
        One line for all, and up to eight with a client each.
    """
    if not clients:
        return []
    counts = [client.num_samples for client in clients]
    total = f"data: {_plural(len(clients), 'client')}, {format_count(sum(counts))} samples"
    if len(clients) > _MAX_CLIENTS:
        spread = f"{format_count(min(counts))} to {format_count(max(counts))}"
        return [f"{total}; {spread} per client, median {format_count(median(counts))}"]
    width = max(len(client.name) for client in clients)
    return [total, *(f"  {client.name:<{width}}  {_holding(client)}" for client in clients)]


def plan_lines(plan: Plan, clients: Sequence[str]) -> list[str]:
    """Sum up a plan, one line a stage.

    Args:
        plan: how the model is cut.
        clients: the clients that share it.

    Returns:
        A heading and the stages, with aligned columns.
    """
    rows = [
        (
            f"  stage {index}",
            stage.device,
            f"layers {layers_text(plan, stage, mark='..')}",
            f"{format_bytes(stage.parameter_bytes)} weights",
            f"{stage.forward_s * 1e3:.3g}+{stage.backward_s * 1e3:.3g} ms",
            f"{format_memory(stage.memory_bytes)} of {format_memory(stage.device_memory_bytes)}",
        )
        for index, stage in enumerate(plan.stages)
    ]
    heading = f"plan of {join_names(clients, 4)}: {describe_cut(plan)}; {'; '.join(describe_plan(plan))}"
    return [heading, *_aligned(rows)]


def start_lines(event: RunStarted) -> list[str]:
    """Sum up what is about to be trained.

    Args:
        event: the start of the run.

    Returns:
        Title, data and the most common plans.
    """
    rounds = _plural(event.num_rounds, "round")
    resumed = f", resuming at round {event.first_round}" if event.first_round > 1 else ""
    lines = [f"{event.title} ({event.engine}, {rounds}{resumed})", *data_lines(event.data)]
    groups: list[PlanGroup] = group_plans(event.plans)
    for group in groups[:_MAX_PLANS]:
        lines += plan_lines(group.plan, group.clients)
    if len(groups) > _MAX_PLANS:
        lines.append(f"and {len(groups) - _MAX_PLANS} other plans")
    return lines


def round_line(record: RoundRecord, num_rounds: int) -> str:
    """Sum up a committed round.

    Args:
        record: the round.
        num_rounds: rounds of the run; 0 where it is not known.

    Returns:
        Such as `"round  3/10  loss 0.612  accuracy 83.1 %  up 1.2 MB  down 1.2 MB  4.1 s"`.
    """
    width = len(str(num_rounds))
    number = f"{record.round:>{width}}/{num_rounds}" if num_rounds else str(record.round)
    accuracy = "" if record.test_accuracy is None else f"  accuracy {format_share(record.test_accuracy)}"
    moved = f"up {format_bytes(record.bytes_up)}  down {format_bytes(record.bytes_down)}"
    loss = format_loss(record.train_loss)
    return f"round {number}  loss {loss}{accuracy}  {moved}  {format_seconds(record.wall_s)}"


def closing_lines(summary: Summary) -> list[str]:
    """The run against centralized training, as a table of plain characters.

    Args:
        summary: the finished run.

    Returns:
        A heading, a rule and the rows.
    """
    rows = [("", "federated", "centralized")]
    rows += [
        (f"  {row.label}" if row.is_detail else row.label, row.federated, row.centralized)
        for row in closing_rows(summary)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows]
    return [lines[0], "-" * (sum(widths) + 4), *lines[1:]]


def write_lines(lines: Iterable[str], file: IO[str]) -> None:
    """Write lines as they can be shown anywhere: no control characters, nothing the file cannot encode.

    Args:
        lines: without line ends.
        file: open for text.

    Raises:
        OSError: the file cannot be written, such as a closed pipe.
    """
    encoding = getattr(file, "encoding", None) or "utf-8"
    for line in lines:
        file.write(printable(line).encode(encoding, "replace").decode(encoding) + "\n")
    file.flush()


def _holding(client: ClientData) -> str:
    held = sum(count > 0 for count in client.label_counts)
    labels = f"  {held} of {len(client.label_counts)} labels" if client.label_counts else ""
    return f"{format_count(client.num_samples):>7} samples{labels}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
