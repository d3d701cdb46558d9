"""Simulated time as lanes, one a client: what it did in the first rounds, whom everyone waited for, who got lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedmp.records import ClockEvent, RoundTimed
from fedmp.report.pictures.canvas import INK, STAGE_COLORS, clean_axes, fit_text, picture
from fedmp.report.pictures.scales import seconds_axis

__all__ = ["draw_clock"]

_COLORS = {
    "pull": STAGE_COLORS[4],
    "train": STAGE_COLORS[0],
    "push": STAGE_COLORS[2],
    "in vain": STAGE_COLORS[1],
    "wait": "#e4e4e4",
}
_RED = STAGE_COLORS[5]
_MAX_LANES, _MAX_ROUNDS = 30, 4
_WIDTH_IN, _LANE_IN = 10.0, 0.24


class _Span(NamedTuple):
    kind: str
    start_s: float
    stop_s: float


def draw_clock(rounds: Sequence[RoundTimed], path: Path) -> None:
    """Draw the first rounds of a simulated run.

    Args:
        rounds: what happened, in order.
        path: where to write; `.svg` or `.png`.

    Raises:
        ValueError: no rounds, or another suffix.
        OSError: the file cannot be written.
    """
    if not rounds:
        raise ValueError("there is no simulated round to draw")
    shown = rounds[:_MAX_ROUNDS]
    clients = list(dict.fromkeys(event.client for timed in shown for event in timed.events if event.client))
    lanes = clients[:_MAX_LANES]
    with picture(path, _WIDTH_IN, 1.5 + _LANE_IN * max(len(lanes), 3)) as figure:
        axes = figure.subplots()
        clean_axes(axes, grid="x")
        kinds: dict[str, None] = {}
        marks: dict[str, None] = {}
        for timed in shown:
            _draw_round(axes, timed, lanes, kinds, marks)
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(left=shown[0].start_s)
        axes.set_yticks(range(len(lanes)), [fit_text(name, 1.6, 8) for name in lanes], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
        end_s = max(timed.start_s + event.time_s for timed in shown for event in timed.events)
        axes.set_xlabel(f"{seconds_axis(axes.xaxis, end_s)} of simulated time")
        axes.set_title(_title(shown, rounds, clients), loc="left", fontsize=11, pad=26)
        _add_legend(axes, kinds, marks)


def _title(shown: Sequence[RoundTimed], rounds: Sequence[RoundTimed], clients: Sequence[str]) -> str:
    numbers = (
        f"round {shown[0].round}" if len(shown) == 1 else f"rounds {shown[0].round} to {shown[-1].round}"
    )
    of = f" of {rounds[-1].round}" if len(rounds) > len(shown) else ""
    who = f", {_MAX_LANES} of {len(clients)} clients" if len(clients) > _MAX_LANES else ""
    return f"simulated time, {numbers}{of}{who}"


def _draw_round(
    axes: Any, timed: RoundTimed, lanes: Sequence[str], kinds: dict[str, None], marks: dict[str, None]
) -> None:
    closed_s = max((event.time_s for event in timed.events if event.what == "closed"), default=math.inf)
    for lane, client in enumerate(lanes):
        events = [event for event in timed.events if event.client == client]
        spans = list(_spans(events, closed_s))
        for span in spans:
            kinds.setdefault(span.kind)
            axes.broken_barh(
                [(timed.start_s + span.start_s, span.stop_s - span.start_s)],
                (lane - 0.36, 0.72) if span.kind != "wait" else (lane - 0.1, 0.2),
                color=_COLORS[span.kind],
                linewidth=0,
            )
        for event in events:
            if event.what in ("lost", "left", "away", "late"):
                marks.setdefault(event.what)
                _mark(axes, timed.start_s + event.time_s, lane, event.what)
    if math.isfinite(closed_s):
        axes.axvline(timed.start_s + closed_s, color=INK, linewidth=0.9)


def _spans(events: Sequence[ClockEvent], closed_s: float) -> Iterator[_Span]:
    """What a client did in a round, attempt by attempt."""
    begun_s = pulled_s = trained_s = 0.0
    for event in sorted(events, key=lambda event: event.time_s):
        if event.what == "begins":
            begun_s = pulled_s = event.time_s
        elif event.what == "pulled":
            pulled_s = event.time_s
        elif event.what == "trained":
            trained_s = event.time_s
            yield _Span("pull", begun_s, pulled_s)
            yield _Span("train", pulled_s, trained_s)
        elif event.what in ("lost", "left"):
            yield _Span("in vain", begun_s, event.time_s)
        elif event.what in ("arrived", "late"):
            yield _Span("push", trained_s, event.time_s)
            if event.what == "arrived" and math.isfinite(closed_s) and closed_s > event.time_s:
                yield _Span("wait", event.time_s, closed_s)


def _mark(axes: Any, time_s: float, lane: int, what: str) -> None:
    style = {"lost": "x", "left": "4", "away": "|", "late": ">"}[what]
    axes.plot([time_s], [lane], style, color=_RED, markersize=6, markeredgewidth=1.6, clip_on=False)


def _add_legend(axes: Any, kinds: dict[str, None], marks: dict[str, None]) -> None:
    names = {
        "pull": "pulls",
        "train": "trains",
        "push": "pushes",
        "wait": "waits",
        "in vain": "trains in vain",
    }
    handles: list[Any] = [Patch(color=_COLORS[kind], label=names[kind]) for kind in names if kind in kinds]
    words = {"lost": "drops out", "left": "leaves", "away": "is away", "late": "too late"}
    for what, style in (("lost", "x"), ("left", "4"), ("away", "|"), ("late", ">")):
        if what in marks:
            handles.append(
                Line2D([], [], color=_RED, marker=style, linestyle="", markersize=6, label=words[what])
            )
    handles.append(Line2D([], [], color=INK, linewidth=0.9, label="round closes"))
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
        columnspacing=1.4,
    )
