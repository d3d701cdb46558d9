"""One measured pipeline step as lanes, one a device, so that waiting can be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from fedmp.records import TimedAction
from fedmp.report.pictures.canvas import (
    GREY,
    INK,
    KIND_COLORS,
    clean_axes,
    fit_text,
    ink_on,
    picture,
    text_width_in,
)
from fedmp.report.trace import time_shares

__all__ = ["draw_timeline"]

_KIND_NAMES = {
    "forward": "forward",
    "backward": "backward",
    "send": "sending",
    "exchange": "exchange",
    "wait": "waiting",
    "step": "optimizer",
}
_WIDTH_IN, _LANE_IN = 10.0, 0.58
_SIZE_PT = 7.0


def draw_timeline(
    actions: Sequence[TimedAction], path: Path, predicted_busy: Mapping[str, float] | None = None
) -> None:
    """Draw what each device did in one step, with the number of the micro-batch in each box it fits.

    Below its lane stand each device's shares of computing, communicating and bubble.

    Args:
        actions: of one client's devices, in any order.
        predicted_busy: by device, the share of the step that the plan expects it to compute; shown next to
            what was measured.
        path: where to write; `.svg` or `.png`.

    Raises:
        ValueError: no actions, or none that takes time, or another suffix.
        OSError: the file cannot be written.
    """
    if not actions:
        raise ValueError("there is no action to draw")
    lanes = _lanes(actions)
    end_s = max(action.stop_s for action in actions)
    if end_s <= 0:
        raise ValueError("the actions of the step take no time at all")
    scale, unit = (1e3, "ms") if end_s < 3 else (1.0, "s")
    with picture(path, _WIDTH_IN, 1.35 + _LANE_IN * len(lanes)) as figure:
        axes = figure.subplots()
        clean_axes(axes)
        axes.set_xlim(0, end_s * scale)
        axes.set_ylim(len(lanes) - 0.38, -0.5)
        _draw_boxes(axes, actions, lanes, scale)
        _number_boxes(axes, actions, lanes, scale)
        names = [_lane_name(device, actions) for device in lanes]
        _write_shares(axes, actions, lanes, predicted_busy)
        axes.set_yticks(range(len(lanes)), names, fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{unit} since the step began")
        axes.set_title("one pipeline step", loc="left", fontsize=11, pad=24)
        _add_legend(axes, actions, end_s * len(lanes))


def _lanes(actions: Sequence[TimedAction]) -> list[str]:
    """Devices by their first stage, then by name."""
    first: dict[str, int] = {}
    for action in actions:
        first[action.device] = min(action.stage, first.get(action.device, action.stage))
    return sorted(first, key=lambda device: (first[device], device))


def _lane_name(device: str, actions: Sequence[TimedAction]) -> str:
    stages = sorted({action.stage for action in actions if action.device == device})
    number = ", ".join(str(stage) for stage in stages)
    return f"{fit_text(device, 1.5, 9)}\nstage{'s' if len(stages) > 1 else ''} {number}"


def _write_shares(
    axes: Any,
    actions: Sequence[TimedAction],
    lanes: Sequence[str],
    predicted_busy: Mapping[str, float] | None,
) -> None:
    for row in time_shares(actions, predicted_busy):
        planned = "" if row.predicted_bubble is None else f" (plan {row.predicted_bubble * 100:.0f} %)"
        text = (
            f"compute {row.compute * 100:.0f} %, communication {row.communication * 100:.0f} %, "
            f"bubble {row.bubble * 100:.0f} %{planned}"
        )
        axes.text(0, lanes.index(row.device) + 0.5, text, fontsize=_SIZE_PT, va="center", color=GREY)


def _draw_boxes(axes: Any, actions: Sequence[TimedAction], lanes: Sequence[str], scale: float) -> None:
    inches_per_s = _inches_per_s(actions)
    # A patch for each of some thousand boxes would take seconds; one collection a lane and kind does not.
    for lane, device in enumerate(lanes):
        for kind in {action.kind for action in actions}:
            spans = [
                (action.start_s * scale, (action.stop_s - action.start_s) * scale)
                for action in actions
                if action.device == device and action.kind == kind
            ]
            height = 0.3 if kind == "wait" else 0.76
            color = KIND_COLORS.get(kind, INK)
            # A white edge parts neighbours; boxes hardly wider than the edge would vanish behind it.
            thinnest_pt = min((span for _, span in spans), default=0.0) / scale * inches_per_s * 72
            edge = min(0.6, 0.12 * thinnest_pt)
            axes.broken_barh(
                spans, (lane - height / 2, height), color=color, edgecolor="white", linewidth=edge
            )


def _number_boxes(axes: Any, actions: Sequence[TimedAction], lanes: Sequence[str], scale: float) -> None:
    inches_per_s = _inches_per_s(actions)
    for action in actions:
        number = str(action.microbatch)
        room_in = (action.stop_s - action.start_s) * inches_per_s
        is_numbered = action.microbatch >= 0 and action.kind != "wait"
        if not is_numbered or text_width_in(number, _SIZE_PT) + 0.04 > room_in:
            continue
        middle = (action.start_s + action.stop_s) / 2 * scale
        ink = ink_on(KIND_COLORS.get(action.kind, INK))
        axes.text(
            middle, lanes.index(action.device), number, ha="center", va="center", fontsize=_SIZE_PT, color=ink
        )


def _inches_per_s(actions: Sequence[TimedAction]) -> float:
    """The scale of the drawing, about: what the labels of the lanes leave of the width."""
    return (_WIDTH_IN - 1.7) / max(action.stop_s for action in actions)


def _add_legend(axes: Any, actions: Sequence[TimedAction], total_s: float) -> None:
    spent = {kind: sum(a.stop_s - a.start_s for a in actions if a.kind == kind) for kind in _KIND_NAMES}
    shares = {kind: seconds / total_s if total_s > 0 else 0.0 for kind, seconds in spent.items()}
    handles = [
        Patch(color=KIND_COLORS[kind], label=f"{name} {shares[kind] * 100:.0f} %")
        for kind, name in _KIND_NAMES.items()
        if spent[kind] > 0
    ]
    idle = 1.0 - sum(shares.values())
    if idle > 0.005:
        handles.append(Patch(facecolor="white", edgecolor="#bbbbbb", label=f"other {idle * 100:.0f} %"))
    axes.legend(
        handles=handles,
        frameon=False,
        fontsize=9,
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.1,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.6,
    )
