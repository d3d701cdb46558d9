"""How the labels are spread over the clients, as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from fedmp.records import ClientData
from fedmp.report.pictures.canvas import LABEL_COLORS, LIGHT, STAGE_COLORS, clean_axes, fit_text, picture
from fedmp.report.units import format_count, visible

__all__ = ["draw_data"]


def draw_data(clients: Sequence[ClientData], path: Path, label_names: Sequence[str] = ()) -> None:
    """Draw a bar a client, its samples stacked by label.

    Up to ten labels have a colour and a legend entry each. More could not be told apart in a stack: then
    the bars are plain, and a shaded map beside them shows each label's share of the client's samples.

    Args:
        clients: who holds what.
        path: where to write; `.svg` or `.png`.
        label_names: names of the labels, in label order; numbers where there are none.

    Raises:
        ValueError: no clients, or another suffix.
        OSError: the file cannot be written.
    """
    if not clients:
        raise ValueError("there is no client to draw")
    num_labels = max(len(client.label_counts) for client in clients)
    names = [visible(label_names[i]) if i < len(label_names) else str(i) for i in range(num_labels)]
    is_stacked = num_labels <= len(LABEL_COLORS)
    rows_in = len(clients) * (0.3 if len(clients) <= 20 else 0.17)
    legend_in = 0.19 * num_labels + 0.5 if is_stacked else 1.6
    height_in = max(1.0 + rows_in, legend_in, 1.5)
    with picture(path, 7.5 if is_stacked else 9.0, height_in) as figure:
        bar_height = min(0.78, 0.3 * len(clients) / (height_in - 0.9))
        if is_stacked:
            axes = figure.subplots()
            _draw_bars(axes, clients, LABEL_COLORS[:num_labels], bar_height)
            if num_labels > 0:
                _add_legend(axes, names)
        else:
            axes, right = figure.subplots(1, 2, width_ratios=[1, 2])
            _draw_bars(axes, clients, (), bar_height)
            _draw_shares(figure, right, clients, names)
        total = format_count(sum(client.num_samples for client in clients))
        axes.set_title(f"samples by client, {total} in all", loc="left", fontsize=11)


def _draw_bars(axes: Any, clients: Sequence[ClientData], colors: Sequence[str], height: float) -> None:
    clean_axes(axes, grid="x")
    rows = range(len(clients))
    left = [0] * len(clients)
    for label, color in enumerate(colors):
        widths = [c.label_counts[label] if label < len(c.label_counts) else 0 for c in clients]
        axes.barh(rows, widths, left=left, color=color, height=height, linewidth=0, label=str(label))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    if not colors:
        axes.barh(rows, [c.num_samples for c in clients], color=STAGE_COLORS[0], height=height, linewidth=0)
    size = 9.0 if len(clients) <= 20 else 7.0
    axes.set_yticks(rows, [fit_text(client.name, 1.6, size) for client in clients], fontsize=size)
    axes.set_ylim(len(clients) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def _draw_shares(figure: Any, axes: Any, clients: Sequence[ClientData], names: Sequence[str]) -> None:
    shares = [
        [count / (sum(client.label_counts) or 1) for count in client.label_counts] for client in clients
    ]
    rows = [row + [0.0] * (len(names) - len(row)) for row in shares]
    image = axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0.0, interpolation="nearest")
    axes.set_ylim(len(clients) - 0.5, -0.5)
    axes.set_yticks([])
    num_ticks = min(len(names), 12)
    ticks = sorted({round(index * (len(names) - 1) / (num_ticks - 1)) for index in range(num_ticks)})
    is_short = max(len(names[tick]) for tick in ticks) <= 4
    axes.set_xticks(
        ticks, [fit_text(names[tick], 1.2, 8) for tick in ticks], fontsize=8, rotation=0 if is_short else 90
    )
    axes.tick_params(length=2)
    for spine in axes.spines.values():
        spine.set_color(LIGHT)
    axes.set_title(f"share of each of {len(names)} labels", loc="left", fontsize=11)
    scale = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, format=PercentFormatter(1.0, decimals=0))
    scale.locator = MaxNLocator(nbins=4)
    scale.update_ticks()
    scale.ax.tick_params(length=2, labelsize=8)
    scale.outline.set_visible(False)


def _add_legend(axes: Any, names: Sequence[str]) -> None:
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        [fit_text(name, 1.5, 9) for name in names],
        frameon=False,
        fontsize=9,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        handlelength=1.0,
        handleheight=1.0,
        labelspacing=0.35,
        borderaxespad=0.2,
    )
