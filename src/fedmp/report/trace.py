"""A measured step as a Chrome trace, and where its time went: computing, communicating, idle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmp.records import Plan, TimedAction

__all__ = [
    "DeviceShares",
    "chrome_trace",
    "format_shares",
    "predicted_busy",
    "time_shares",
    "write_chrome_trace",
]

_COMPUTES = ("forward", "backward", "step")
_COMMUNICATES = ("send", "exchange")
_COLOURS = {
    "forward": "thread_state_running",
    "backward": "thread_state_runnable",
    "send": "rail_load",
    "exchange": "rail_load",
    "step": "rail_response",
    "wait": "grey",
}


@dataclass(frozen=True)
class DeviceShares:
    """How a device spent a step; the shares add up to 1.

    Attributes:
        device: its name.
        compute: share of the step in forwards, backwards and the optimizer.
        communication: share in packing and starting messages, and in exchanging gradients and norms.
        bubble: the rest: waiting for another device, or with nothing left to do.
        predicted_bubble: what the plan said; None if it said nothing.
    """

    device: str
    compute: float
    communication: float
    bubble: float
    predicted_bubble: float | None = None


def time_shares(
    actions: Sequence[TimedAction], predicted_busy: Mapping[str, float] | None = None
) -> list[DeviceShares]:
    """Shares of the time from the first action's start to the last one's end on any device.

    Args:
        actions: of one step, of all devices, on one clock.
        predicted_busy: by device name, the share of the step that the plan expects it to compute.

    Returns:
        One row a device, in the order of their stages.
    """
    if not actions:
        return []
    span_s = max(a.stop_s for a in actions) - min(a.start_s for a in actions)
    names = [a.device for a in sorted(actions, key=lambda action: action.stage)]
    rows = []
    for name in dict.fromkeys(names):
        own = [action for action in actions if action.device == name]
        compute = sum(a.stop_s - a.start_s for a in own if a.kind in _COMPUTES) / max(span_s, 1e-12)
        sending = sum(a.stop_s - a.start_s for a in own if a.kind in _COMMUNICATES) / max(span_s, 1e-12)
        busy = None if predicted_busy is None else predicted_busy.get(name)
        rows.append(
            DeviceShares(
                name, compute, sending, max(0.0, 1 - compute - sending), None if busy is None else 1 - busy
            )
        )
    return rows


def predicted_busy(plan: Plan) -> dict[str, float]:
    """The share of a step that a plan expects each device to compute, by its name."""
    busy_s = dict.fromkeys(plan.devices, 0.0)
    for stage in plan.stages:
        busy_s[stage.device] += plan.num_microbatches * (stage.forward_s + stage.backward_s)
    return {device: seconds / plan.step_s if plan.step_s > 0 else 0.0 for device, seconds in busy_s.items()}


def format_shares(shares: Sequence[DeviceShares]) -> str:
    """The shares as a small table of percentages."""
    width = max([6, *(len(row.device) for row in shares)])
    lines = [f"{'device':{width}}  compute  communication  bubble  planned bubble"]
    for row in shares:
        planned = "-" if row.predicted_bubble is None else f"{row.predicted_bubble:.0%}"
        lines.append(
            f"{row.device:{width}}  {row.compute:7.0%}  {row.communication:13.0%}  {row.bubble:6.0%}  {planned:>14}"
        )
    return "\n".join(lines)


def chrome_trace(actions: Sequence[TimedAction]) -> dict[str, Any]:
    """A measured step in the Trace Event Format, for chrome://tracing or https://ui.perfetto.dev.

    Args:
        actions: of one step, of all devices, on one clock.

    Returns:
        Plain data for JSON: one process a device, one row a stage, times in microseconds.
    """
    start_s = min((action.start_s for action in actions), default=0.0)
    devices = {name: number for number, name in enumerate(dict.fromkeys(a.device for a in actions))}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}}
        for name, number in devices.items()
    ]
    for action in actions:
        label = action.kind if action.microbatch < 0 else f"{action.kind} {action.microbatch}"
        events.append(
            {
                "ph": "X",
                "name": label,
                "cat": action.kind,
                "pid": devices[action.device],
                "tid": action.stage,
                "ts": round(1e6 * (action.start_s - start_s), 3),
                "dur": round(1e6 * (action.stop_s - action.start_s), 3),
                "cname": _COLOURS.get(action.kind, "generic_work"),
                "args": {"stage": action.stage, "micro-batch": action.microbatch},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(actions: Sequence[TimedAction], path: Path) -> None:
    """Write `chrome_trace(actions)` as JSON."""
    path.write_text(json.dumps(chrome_trace(actions)))
