"""The table: metric, centralized, fedmp, improvement; as words for people and as numbers for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from fedmp.paper.times import CenterTimes, SiteTimes
from fedmp.records import Summary
from fedmp.report import format_bytes, format_seconds, format_share

__all__ = ["PaperRow", "make_rows", "paper_table", "verdict"]


@dataclass(frozen=True)
class PaperRow:
    """One line.

    Attributes:
        metric: what is compared.
        centralized, fedmp: of both sides, as text.
        improvement: of fedmp over centralized, as text; says so where centralized wins.
        values: both sides as numbers, in seconds, bytes, devices and shares; None where there is none.
        is_worse: whether fedmp loses: to centralized training, or under failures to itself without them.
    """

    metric: str
    centralized: str
    fedmp: str
    improvement: str
    values: tuple[float | None, float | None]
    is_worse: bool = False


def make_rows(
    summary: Summary,
    sites: SiteTimes,
    center: CenterTimes,
    failing: Summary | None,
    *,
    num_center: int,
    num_lost: int,
) -> list[PaperRow]:
    """Put both sides beside each other.

    Args:
        summary: of the federation's run, with centralized training.
        sites, center: their predicted times.
        failing: of the run with failures; None where there was none.
        num_center: devices of the centre.
        num_lost: devices that fail.
    """
    moved = float(summary.bytes_up + summary.bytes_down)
    rows = [
        _less("time per epoch", center.epoch_s, sites.epoch_s, format_seconds),
        _less("  of it training", center.train_s, sites.train_s, format_seconds),
        _less(
            f"time of all {center.epochs:g} epochs",
            center.epochs * center.epoch_s,
            summary.simulated_s,
            format_seconds,
        ),
        _less("  against a centre without any overhead", center.ideal_s, sites.epoch_s, format_seconds),
        _accuracy("accuracy", summary.centralized_accuracy, summary.final_accuracy),
        PaperRow(
            "devices",
            f"{num_center}",
            f"{summary.devices}",
            f"x {summary.devices / num_center:.3g}",
            (num_center, summary.devices),
        ),
        _less("moved between sites", center.raw_bytes, moved, format_bytes),
        _less("moved inside a site", center.inside_bytes, float(summary.pipeline_bytes), format_bytes),
        PaperRow("raw samples that leave their owner", "all", "none", "privacy", (1.0, 0.0)),
    ]
    return rows + ([] if failing is None else _failure_rows(summary, sites, failing, num_lost))


def paper_table(rows: Sequence[PaperRow]) -> Table:
    """The rows as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, border_style="bright_black")
    table.add_column("metric", overflow="fold")
    for name in ("centralized", "fedmp", "improvement"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(row.metric, row.centralized, row.fedmp, row.improvement)
    return table


def verdict(rows: Sequence[PaperRow]) -> str:
    """Where centralized training wins, in a sentence."""
    lost = [row.metric.strip() for row in rows if "centralized wins" in row.improvement]
    return (
        f"centralized training wins at: {', '.join(lost)}"
        if lost
        else "centralized training wins nowhere here"
    )


def _failure_rows(summary: Summary, sites: SiteTimes, failing: Summary, num_lost: int) -> list[PaperRow]:
    name = f"with {num_lost} devices lost"
    epoch_s = failing.simulated_s / max(summary.simulated_s, 1e-12) * sites.epoch_s
    slower = f"{100 * (epoch_s / sites.epoch_s - 1):+.0f} % time"
    return [
        PaperRow(
            f"{name}: time per epoch",
            "stops if it was the server",
            format_seconds(epoch_s),
            slower,
            (None, epoch_s),
            is_worse=epoch_s > sites.epoch_s,
        ),
        PaperRow(
            f"{name}: accuracy",
            "-",
            format_share(failing.final_accuracy),
            _points(summary.final_accuracy, failing.final_accuracy),
            (None, failing.final_accuracy),
            is_worse=_is_less(summary.final_accuracy, failing.final_accuracy),
        ),
        PaperRow(
            f"{name}: rounds committed",
            "-",
            f"{failing.rounds} of {summary.rounds}",
            f"{failing.recoveries} begun anew",
            (None, failing.rounds),
            is_worse=failing.rounds < summary.rounds,
        ),
    ]


def _less(metric: str, centralized: float, fedmp: float, form: Callable[[float], str]) -> PaperRow:
    """A row where less is better."""
    if fedmp <= centralized:
        text = f"-{100 * (1 - fedmp / centralized):.1f} %" if centralized > 0 else "none"
    else:
        text = f"x {fedmp / centralized:.3g}, centralized wins" if centralized > 0 else "centralized wins"
    return PaperRow(
        metric, form(centralized), form(fedmp), text, (centralized, fedmp), is_worse=fedmp > centralized
    )


def _accuracy(metric: str, centralized: float | None, fedmp: float | None) -> PaperRow:
    is_worse = _is_less(centralized, fedmp)
    text = _points(centralized, fedmp, ", centralized wins" if is_worse else "")
    return PaperRow(
        metric, format_share(centralized), format_share(fedmp), text, (centralized, fedmp), is_worse=is_worse
    )


def _points(before: float | None, after: float | None, remark: str = "") -> str:
    if before is None or after is None:
        return "-"
    return f"{100 * (after - before):+.1f} points{remark}"


def _is_less(before: float | None, after: float | None) -> bool:
    """Whether an accuracy fell by what the table's one decimal shows."""
    return before is not None and after is not None and 100 * (after - before) < -0.05
