"""Accuracy of several runs against what it costs: rounds, bytes and simulated time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedmp.report.pictures.canvas import STAGE_COLORS, clean_axes, picture
from fedmp.report.pictures.scales import bytes_axis, seconds_axis

__all__ = ["Curve", "draw_comparison"]

_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))
_WIDE = 30.0  # times: a longer range of costs is drawn logarithmically


@dataclass(frozen=True)
class Curve:
    """A run as it went.

    Attributes:
        label: its name.
        points: of each round its number, the bytes moved and the simulated seconds by then, and its accuracy
            (None where it was not measured).
    """

    label: str
    points: tuple[tuple[int, float, float, float | None], ...]


def draw_comparison(curves: Sequence[Curve], path: Path) -> None:
    """Draw accuracy against rounds, bytes moved and simulated time, one line a run.

    Args:
        curves: the runs.
        path: where to write; `.svg` or `.png`.

    Raises:
        ValueError: no runs, or another suffix.
        OSError: the file cannot be written.
    """
    if not curves:
        raise ValueError("there is no run to draw")
    rows = math.ceil(len(curves) / 3)
    with picture(path, 11.0, 3.7 + 0.22 * rows) as figure:
        left, middle, right = figure.subplots(1, 3, sharey=True)
        left.set_ylabel("accuracy on held-out data")
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        for axes, cost, title in (
            (left, 0, "rounds"),
            (middle, 1, "bytes moved"),
            (right, 2, "simulated time"),
        ):
            _draw(axes, curves, cost)
            axes.set_title(title, loc="left", fontsize=11)
        ends = [curve.points[-1] for curve in curves if curve.points]
        left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        middle.set_xlabel(bytes_axis(middle.xaxis, max((end[1] for end in ends), default=0.0)))
        right.set_xlabel(seconds_axis(right.xaxis, max((end[2] for end in ends), default=0.0)))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower left", ncols=min(len(curves), 3), frameon=False, fontsize=9
        )


def _draw(axes: Any, curves: Sequence[Curve], cost: int) -> None:
    clean_axes(axes, grid="y")
    ends = []
    for number, curve in enumerate(curves):
        points = [(point[cost], point[3]) for point in curve.points if point[3] is not None]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        ends += [x[0], x[-1]]
        axes.plot(
            x,
            y,
            color=STAGE_COLORS[number % len(STAGE_COLORS)],
            linestyle=_DASHES[number // len(STAGE_COLORS) % len(_DASHES)],
            linewidth=1.6,
            marker="o" if len(points) == 1 else None,
            markersize=4,
            label=curve.label,
        )
    lasts = ends[1::2]
    if cost and lasts and min(lasts) > 0 and max(lasts) > _WIDE * min(lasts):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
