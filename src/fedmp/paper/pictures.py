"""The table as a picture, with accuracy over simulated time below; and the curves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedmp.paper.curves import CURVE_TITLES, CurvePoint
from fedmp.paper.table import PaperRow
from fedmp.paper.times import CenterTimes
from fedmp.records import RoundRecord
from fedmp.report.pictures.canvas import GREY, INK, LIGHT, STAGE_COLORS, clean_axes, picture
from fedmp.report.pictures.scales import seconds_axis

__all__ = ["draw_curves", "draw_paper"]

_BLUE, _GREEN, _RED, _ORANGE = STAGE_COLORS[0], STAGE_COLORS[2], STAGE_COLORS[5], STAGE_COLORS[1]
_COLUMNS = (0.0, 0.56, 0.76, 1.0)  # where the columns begin or, but for the first, end
_ROW_IN = 0.27


def draw_paper(
    rows: Sequence[PaperRow],
    history: Sequence[RoundRecord],
    failing: Sequence[RoundRecord],
    center: CenterTimes,
    centralized_accuracy: float | None,
    path: Path,
) -> None:
    """Draw the table, and accuracy over simulated time.

    Args:
        rows: the table.
        history: the federation's rounds.
        failing: those of the run with failures; empty where there was none.
        center: the centralized side.
        centralized_accuracy: in the end, 0 to 1; None where it was not measured.
        path: where to write; `.svg` or `.png`.

    Raises:
        OSError: the file cannot be written.
    """
    height_in = _ROW_IN * (len(rows) + 1.5)
    with picture(path, 9.0, height_in + 3.6) as figure:
        upper, lower = figure.subplots(2, 1, gridspec_kw={"height_ratios": [height_in, 3.2]})
        _draw_table(upper, rows)
        _draw_accuracy(lower, history, failing, center, centralized_accuracy)


def draw_curves(points: Sequence[CurvePoint], path: Path) -> None:
    """Draw the improvement of the time per epoch over each assumption.

    Args:
        points: of all curves.
        path: where to write; `.svg` or `.png`.

    Raises:
        OSError: the file cannot be written.
    """
    curves = list(dict.fromkeys(point.curve for point in points))
    columns = 3
    rows = -(-len(curves) // columns)
    with picture(path, 3.9 * columns, 3.1 * rows + 0.3) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        axes = list(itertools.chain.from_iterable(grid))
        for cell, curve in zip(axes, curves, strict=False):
            _draw_curve(cell, [point for point in points if point.curve == curve])
            cell.set_xlabel(CURVE_TITLES[curve])
        for cell in axes[len(curves) :]:
            cell.axis("off")
        for row in grid:
            row[0].set_ylabel("time per epoch saved")
        if len(axes) > len(curves):
            text = (
                "Above the line fedmp is faster,\nbelow it (red) centralized training.\n\n"
                "The ring is what the table assumes;\nall else is as there.\n\n"
                "Below -100 % is not drawn."
            )
            axes[-1].text(0.05, 0.5, text, fontsize=9, color=GREY, va="center", transform=axes[-1].transAxes)


def _draw_table(axes: Any, rows: Sequence[PaperRow]) -> None:
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) + 0.6, -0.9)
    header = ("metric", "centralized", "fedmp", "improvement")
    for column, text in enumerate(header):
        _cell(axes, column, -0.35, text, color=GREY)
    axes.axhline(0.1, color=INK, linewidth=0.8)
    for number, row in enumerate(rows):
        y = number + 0.62
        is_detail = row.metric.startswith("  ")
        ink = GREY if is_detail else INK
        _cell(axes, 0, y, f"   {row.metric.strip()}" if is_detail else row.metric, color=ink)
        _cell(axes, 1, y, row.centralized, color=ink)
        _cell(axes, 2, y, row.fedmp, color=ink)
        _cell(axes, 3, y, row.improvement, color=_RED if row.is_worse else ink if is_detail else _BLUE)
        axes.axhline(number + 1.1, color=LIGHT, linewidth=0.6)


def _cell(axes: Any, column: int, y: float, text: str, *, color: str) -> None:
    side = "left" if column == 0 else "right"
    axes.text(_COLUMNS[column], y, text, ha=side, va="center", fontsize=9, color=color)


def _draw_accuracy(
    axes: Any,
    history: Sequence[RoundRecord],
    failing: Sequence[RoundRecord],
    center: CenterTimes,
    centralized_accuracy: float | None,
) -> None:
    clean_axes(axes, grid="y")
    end_s = center.epochs * center.epoch_s
    for records, color, label, style in (
        (history, _BLUE, "fedmp", "-"),
        (failing, _ORANGE, "fedmp, devices fail", (0, (4, 1.5))),
    ):
        times = itertools.accumulate(record.simulated_s for record in records)
        known = [
            (time_s, record.test_accuracy)
            for time_s, record in zip(times, records, strict=True)
            if record.test_accuracy is not None
        ]
        if not known:
            continue
        axes.plot(*zip(*known, strict=True), color=color, linewidth=1.8, label=label, linestyle=style)
        end_s = max(end_s, known[-1][0])
    if centralized_accuracy is not None:
        done_s = center.epochs * center.epoch_s
        axes.plot([done_s], [centralized_accuracy], "D", color=INK, markersize=6, label="centralized, done")
        axes.axhline(centralized_accuracy, color=GREY, linestyle=(0, (5, 3)), linewidth=0.9)
    axes.set_xlim(0, end_s * 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.set_xlabel(f"{seconds_axis(axes.xaxis, end_s)} of simulated time")
    axes.set_title("accuracy on held-out data", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_curve(axes: Any, points: Sequence[CurvePoint]) -> None:
    clean_axes(axes, grid="y")
    x = [point.value for point in points]
    y = [point.improvement for point in points]
    axes.set_xscale("log")
    axes.axhspan(-1.0, 0.0, color=_RED, alpha=0.07, linewidth=0)
    axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.plot(x, y, color=_BLUE, linewidth=1.8, marker="o", markersize=3.5)
    for point in points:
        if point.is_default:
            axes.plot([point.value], [point.improvement], "o", color=_RED, markersize=9, fillstyle="none")
    axes.set_ylim(-1.0, 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda *_: "")
