"""The closing comparison, federated against centralized, as rows of words for any view to lay out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedmp.records import Summary
from fedmp.report.units import format_bytes, format_count, format_seconds, format_share

__all__ = ["ClosingRow", "closing_rows"]


@dataclass(frozen=True)
class ClosingRow:
    """One line of the comparison.

    Attributes:
        label: what is compared.
        federated, centralized: the values as text; empty where there is nothing to compare.
        is_detail: whether it is a part of the row above.
    """

    label: str
    federated: str
    centralized: str = ""
    is_detail: bool = False


def closing_rows(summary: Summary) -> list[ClosingRow]:
    """Put a run beside the centralized training it is measured against.

    Args:
        summary: the finished run.

    Returns:
        Accuracy, gap, samples, bytes and time, in that order; "not asked for" where no centralized
        training was run.
    """
    return [*_accuracy_rows(summary), *_cost_rows(summary)]


def _accuracy_rows(summary: Summary) -> list[ClosingRow]:
    accuracy = "not measured" if summary.final_accuracy is None else format_share(summary.final_accuracy)
    centralized = _asked(summary, summary.centralized_accuracy, format_share)
    rows = [ClosingRow("test accuracy", accuracy, centralized)]
    if summary.final_accuracy is not None and summary.centralized_accuracy is not None:
        rows.append(ClosingRow("gap", _gap(summary.final_accuracy, summary.centralized_accuracy)))
    return rows


def _cost_rows(summary: Summary) -> list[ClosingRow]:
    moved = summary.bytes_up + summary.bytes_down + summary.pipeline_bytes
    rows = [
        ClosingRow(
            "samples processed",
            format_count(summary.samples_processed),
            _asked(summary, summary.centralized_samples, format_count),
        ),
        ClosingRow(
            "bytes moved", format_bytes(moved), _asked(summary, summary.centralized_bytes, format_bytes)
        ),
        ClosingRow("up to the coordinator", format_bytes(summary.bytes_up), is_detail=True),
        ClosingRow("down from the coordinator", format_bytes(summary.bytes_down), is_detail=True),
        ClosingRow("between devices", format_bytes(summary.pipeline_bytes), is_detail=True),
        ClosingRow(
            "time on this machine",
            format_seconds(summary.wall_s),
            _asked(summary, summary.centralized_wall_s, format_seconds),
        ),
    ]
    if summary.startup_s > 0:
        rows.append(ClosingRow("start-up", format_seconds(summary.startup_s), is_detail=True))
    if summary.simulated_s > 0:
        rows.append(ClosingRow("time predicted for the devices", format_seconds(summary.simulated_s)))
    if summary.faults > 0:
        rows.append(ClosingRow("faults survived", format_count(summary.faults)))
    return rows


def _asked(summary: Summary, value: float | None, form: Callable[[float], str]) -> str:
    if value is not None:
        return form(value)
    was_asked = summary.centralized_accuracy is not None
    return "not measured" if was_asked else "not asked for"


def _gap(federated: float, centralized: float) -> str:
    points = (federated - centralized) * 100
    if abs(points) < 0.05:
        return "none"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"
