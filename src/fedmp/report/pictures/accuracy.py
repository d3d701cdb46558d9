"""Accuracy and loss over the rounds, with the centralized result as a line to reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedmp.records import RoundRecord
from fedmp.report.pictures.canvas import GREY, STAGE_COLORS, clean_axes, picture
from fedmp.report.units import format_share

__all__ = ["draw_accuracy"]

_BLUE, _ORANGE, _GREEN = STAGE_COLORS[0], STAGE_COLORS[5], STAGE_COLORS[2]
_STEPS = (1, 2, 5, 10)
_LEAST_SPAN = 0.1


def draw_accuracy(records: Sequence[RoundRecord], path: Path, centralized: float | None = None) -> None:
    """Draw accuracy above and loss below, by round.

    Args:
        records: the rounds, in order; a series that none of them has is left out.
        path: where to write; `.svg` or `.png`.
        centralized: accuracy of the centralized training, from 0 to 1; None where there is none.

    Raises:
        ValueError: no records, or another suffix.
        OSError: the file cannot be written.
    """
    if not records:
        raise ValueError("there is no round to draw")
    has_accuracy = any(r.test_accuracy is not None or r.federated_accuracy is not None for r in records)
    with picture(path, 7.0, 5.4 if has_accuracy else 3.0) as figure:
        if has_accuracy:
            upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
            _draw_accuracies(upper, records, centralized)
        else:
            lower = figure.subplots()
        _draw_losses(lower, records)
        lower.set_xlabel("round")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=_STEPS))
        first, last = records[0].round, records[-1].round
        margin = max((last - first) * 0.02, 0.5 if first == last else 0.1)
        if first == last:
            lower.set_xticks([first])
        lower.set_xlim(first - margin, last + margin)


def _draw_accuracies(axes: Any, records: Sequence[RoundRecord], centralized: float | None) -> None:
    clean_axes(axes, grid="y")
    tests = [record.test_accuracy for record in records]
    _line(axes, records, tests, _BLUE, "held-out data")
    _line(axes, records, [r.federated_accuracy for r in records], _GREEN, "clients' own data", style=":")
    if centralized is not None:
        label = f"centralized, {format_share(centralized)}"
        axes.axhline(centralized, color=GREY, linestyle=(0, (5, 3)), linewidth=1.2, label=label)
    known = [value for value in tests if value is not None]
    title = f"accuracy, {format_share(known[-1])} in the end" if known else "accuracy"
    axes.set_title(title, loc="left", fontsize=11)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))
    low, high = axes.get_ylim()
    # On a narrower range noise would look like progress.
    spread = max(_LEAST_SPAN - (high - low), 0.0) / 2
    axes.set_ylim(max(low - spread, -0.02), min(high + spread, 1.02))
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_losses(axes: Any, records: Sequence[RoundRecord]) -> None:
    clean_axes(axes, grid="y")
    _line(axes, records, [record.train_loss for record in records], _ORANGE, "in training")
    _line(axes, records, [record.test_loss for record in records], _BLUE, "held-out data")
    axes.set_title("loss", loc="left", fontsize=11)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS))
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _line(
    axes: Any,
    records: Sequence[RoundRecord],
    values: Sequence[float | None],
    color: str,
    label: str,
    style: str = "-",
) -> None:
    points = [
        (record.round, value)
        for record, value in zip(records, values, strict=True)
        if value is not None and math.isfinite(value)
    ]
    if not points:
        return
    # Dots show single rounds; on a long run they would only thicken the line.
    marker = "o" if len(points) <= 30 else None
    x, y = zip(*points, strict=True)
    axes.plot(x, y, style, color=color, label=label, linewidth=1.8, marker=marker, markersize=3.5)
