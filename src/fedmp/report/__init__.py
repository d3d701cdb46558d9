"""How a run is shown and what it leaves behind. Records and events come in from the engines; tables, a live
view, pictures and the files of the run directory go out. Nothing here computes, and nothing here may stop a
run: only a run directory that cannot be written is an error, raised before the run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedmp.report.live import LiveView, PlainView, QuietView, View, make_view
from fedmp.report.logs import LogView, configure_logs
from fedmp.report.run_directory import RunDirectory
from fedmp.report.tables import closing_table, data_table, plan_table, plans_panel
from fedmp.report.trace import DeviceShares, chrome_trace, format_shares, time_shares, write_chrome_trace
from fedmp.report.units import format_bytes, format_count, format_memory, format_seconds, format_share

if TYPE_CHECKING:
    from fedmp.report.pictures import draw_accuracy, draw_data, draw_plan, draw_timeline

__all__ = [
    "DeviceShares",
    "LiveView",
    "LogView",
    "PlainView",
    "QuietView",
    "RunDirectory",
    "View",
    "chrome_trace",
    "closing_table",
    "configure_logs",
    "data_table",
    "draw_accuracy",
    "draw_data",
    "draw_plan",
    "draw_timeline",
    "format_bytes",
    "format_count",
    "format_memory",
    "format_seconds",
    "format_share",
    "format_shares",
    "make_view",
    "plan_table",
    "plans_panel",
    "time_shares",
    "write_chrome_trace",
]


def __getattr__(name: str) -> Any:
    if name in ("draw_accuracy", "draw_data", "draw_plan", "draw_timeline"):  # these import matplotlib
        from fedmp.report import pictures

        return getattr(pictures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
