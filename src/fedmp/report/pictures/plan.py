"""The plans of a run: a strip in proportion to predicted time, and a card for each stage below it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.patches import Polygon, Rectangle

from fedmp.records import Plan, StagePlan
from fedmp.report.pictures.canvas import (
    GREY,
    LIGHT,
    STAGE_COLORS,
    fit_text,
    ink_on,
    picture,
    text_width_in,
)
from fedmp.report.plan_groups import bottleneck, describe_cut, describe_plan, group_plans, join_names
from fedmp.report.units import format_bytes, format_memory, format_seconds, shorten_layer

__all__ = ["draw_plan"]

_MAX_PLANS = 6
_CARD_IN, _GAP_IN, _MARGIN_IN = 1.45, 0.58, 0.25
_ROW_IN, _STRIP_IN = 2.95, 0.34
_MIN_WIDTH_IN = 7.0
_CARD_INK = "#444444"


def draw_plan(plans: Mapping[str, Plan], path: Path) -> None:
    """Draw each distinct plan: which device takes which layers, for how long, with how much memory.

    The strip's boxes are as wide as the predicted forward and backward time of one micro-batch. The
    drawing is in inches, so that text can be fitted to its place.

    Args:
        plans: by client name; clients with equal plans share a drawing, and the six most common are drawn.
        path: where to write; `.svg` or `.png`.

    Raises:
        ValueError: no plans, or another suffix.
        OSError: the file cannot be written.
    """
    if not plans:
        raise ValueError("there is no plan to draw")
    groups = group_plans(plans)
    shown = groups[:_MAX_PLANS]
    most = max(group.plan.num_stages for group in shown)
    width_in = max(most * (_CARD_IN + _GAP_IN) - _GAP_IN + 2 * _MARGIN_IN, _MIN_WIDTH_IN)
    height_in = len(shown) * _ROW_IN + (0.3 if len(groups) > len(shown) else 0.0)
    with picture(path, width_in, height_in) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_xlim(0, width_in)
        axes.set_ylim(0, height_in)
        axes.axis("off")
        for row, group in enumerate(shown):
            clients = join_names(group.clients, 5)
            _draw_row(axes, group.plan, clients, width_in, height_in - row * _ROW_IN)
        if len(groups) > len(shown):
            _write(axes, _MARGIN_IN, 0.2, f"and {len(groups) - len(shown)} other plans", color=GREY)


def _draw_row(axes: Any, plan: Plan, clients: str, width_in: float, top_in: float) -> None:
    room_in = width_in - 2 * _MARGIN_IN
    _write(axes, _MARGIN_IN, top_in - 0.27, fit_text(f"plan of {clients}", room_in, 11), size=11)
    _write(axes, _MARGIN_IN, top_in - 0.48, fit_text(describe_cut(plan), room_in, 8), color=GREY)
    promise = "; ".join(describe_plan(plan))
    _write(axes, _MARGIN_IN, top_in - 0.63, fit_text(promise, room_in, 8), color=GREY)
    strip_in = top_in - 0.79 - _STRIP_IN
    total_s = sum(stage.forward_s + stage.backward_s for stage in plan.stages)
    step_in = (room_in + _GAP_IN) / plan.num_stages
    card_in = step_in - _GAP_IN
    left_in = _MARGIN_IN
    for index, stage in enumerate(plan.stages):
        busy_s = stage.forward_s + stage.backward_s
        box_in = room_in * (busy_s / total_s if total_s > 0 else 1 / plan.num_stages)
        _draw_box(axes, plan, index, left_in, strip_in, box_in)
        card_left_in = _MARGIN_IN + index * step_in
        _draw_funnel(
            axes,
            _color(plan, index),
            (left_in, left_in + box_in),
            (card_left_in, card_left_in + card_in),
            strip_in,
        )
        _draw_card(axes, plan, index, card_left_in, strip_in - 0.3, card_in)
        if index < plan.num_stages - 1:
            _draw_cut(axes, plan, index, card_left_in + card_in, strip_in - 0.72)
        left_in += box_in


def _draw_box(axes: Any, plan: Plan, index: int, left_in: float, bottom_in: float, width_in: float) -> None:
    color = _color(plan, index)
    axes.add_patch(
        Rectangle((left_in, bottom_in), width_in, _STRIP_IN, facecolor=color, edgecolor="white", lw=1.2)
    )
    stage = plan.stages[index]
    busy = format_seconds(stage.forward_s + stage.backward_s)
    labels = (f"{busy}, slowest" if _is_slowest(plan, index) else busy, busy, str(index))
    text = next((label for label in labels if text_width_in(label, 9) < width_in - 0.06), "")
    _write(
        axes,
        left_in + width_in / 2,
        bottom_in + _STRIP_IN / 2,
        text,
        size=9,
        color=ink_on(color),
        ha="center",
    )


def _draw_funnel(
    axes: Any, color: str, box_in: tuple[float, float], card_in: tuple[float, float], top_in: float
) -> None:
    corners = [
        (box_in[0], top_in),
        (box_in[1], top_in),
        (card_in[1], top_in - 0.22),
        (card_in[0], top_in - 0.22),
    ]
    axes.add_patch(Polygon(corners, facecolor=color, alpha=0.16, lw=0))


def _draw_card(axes: Any, plan: Plan, index: int, left_in: float, top_in: float, width_in: float) -> None:
    stage = plan.stages[index]
    axes.add_patch(Rectangle((left_in, top_in + 0.05), width_in, 0.03, facecolor=_color(plan, index), lw=0))
    # Bold letters are about a tenth wider than those that are measured.
    device = fit_text(stage.device, width_in, 11)
    _write(axes, left_in, top_in - 0.1, device, size=10, weight="bold")
    num_layers = stage.stop - stage.start
    lines = [
        fit_text(f"stage {index}, {num_layers} layer{'s' if num_layers > 1 else ''}", width_in, 8),
        *_layer_lines(plan, stage, width_in),
        fit_text(f"{format_seconds(stage.forward_s)} + {format_seconds(stage.backward_s)}", width_in, 8),
        fit_text(f"{format_bytes(stage.parameter_bytes)} weights", width_in, 8),
    ]
    for row, line in enumerate(lines):
        _write(axes, left_in, top_in - 0.3 - row * 0.165, line, color=_CARD_INK)
    _draw_memory(axes, plan, stage, left_in, top_in - 0.36 - len(lines) * 0.165, width_in)


def _layer_lines(plan: Plan, stage: StagePlan, width_in: float) -> list[str]:
    """The first and the last layer, on one line where there is room."""
    first, last = plan.layer_names[stage.start], plan.layer_names[stage.stop - 1]
    if stage.stop - stage.start == 1:
        return [fit_text(first, width_in, 8, shorten_layer)]
    if text_width_in(f"{first} to {last}", 8) <= width_in:
        return [f"{first} to {last}"]
    room_in = width_in - text_width_in("to ", 8)
    return [fit_text(first, width_in, 8, shorten_layer), f"to {fit_text(last, room_in, 8, shorten_layer)}"]


def _draw_memory(
    axes: Any, plan: Plan, stage: StagePlan, left_in: float, y_in: float, width_in: float
) -> None:
    if stage.device_memory_bytes <= 0:
        return
    share = min(stage.memory_bytes / stage.device_memory_bytes, 1.0)
    on_device = sum(other.memory_bytes for other in plan.stages if other.device == stage.device)
    whole = min(on_device / stage.device_memory_bytes, 1.0)
    bar_in = min(width_in, 1.5 * _CARD_IN)
    color = STAGE_COLORS[5] if whole > 0.9 else "#555555"
    axes.add_patch(Rectangle((left_in, y_in), bar_in, 0.07, facecolor=LIGHT, lw=0))
    if whole > share:  # what the device's other stages need
        axes.add_patch(Rectangle((left_in, y_in), bar_in * whole, 0.07, facecolor=GREY, alpha=0.5, lw=0))
    axes.add_patch(Rectangle((left_in, y_in), bar_in * share, 0.07, facecolor=color, lw=0))
    text = f"{format_memory(stage.memory_bytes)} of {format_memory(stage.device_memory_bytes)}"
    _write(axes, left_in, y_in - 0.11, fit_text(text, width_in, 8), color=_CARD_INK)


def _draw_cut(axes: Any, plan: Plan, index: int, left_in: float, y_in: float) -> None:
    stage, slowest = plan.stages[index], bottleneck(plan)
    if plan.stages[index + 1].device == stage.device:
        _write(axes, left_in + _GAP_IN / 2, y_in, "stays", color=GREY, ha="center")
        return
    is_slowest = slowest.is_link_after(index)
    color = STAGE_COLORS[5] if is_slowest else GREY
    arrow = {"arrowstyle": "->", "color": color, "lw": 1.6 if is_slowest else 1.0}
    axes.annotate("", (left_in + _GAP_IN - 0.06, y_in), (left_in + 0.06, y_in), arrowprops=arrow)
    middle_in = left_in + _GAP_IN / 2
    sent = fit_text(format_bytes(stage.boundary_bytes), _GAP_IN, 8)
    _write(axes, middle_in, y_in + 0.13, sent, color=color, ha="center")
    if stage.send_s > 0:
        _write(
            axes,
            middle_in,
            y_in - 0.13,
            fit_text(format_seconds(stage.send_s), _GAP_IN, 8),
            color=color,
            ha="center",
        )


def _write(axes: Any, x_in: float, y_in: float, text: str, *, size: float = 8, **style: Any) -> None:
    axes.text(x_in, y_in, text, fontsize=size, va="center", **style)


def _is_slowest(plan: Plan, index: int) -> bool:
    slowest = bottleneck(plan)
    return plan.num_devices > 1 and slowest.is_stage(index)


def _color(plan: Plan, index: int) -> str:
    """Of the stage's device; the stages of one device have one colour."""
    return STAGE_COLORS[plan.devices.index(plan.stages[index].device) % len(STAGE_COLORS)]
