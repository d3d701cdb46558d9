"""Pictures of a run, written as SVG or PNG by the suffix of their path, whole or not at all."""

from __future__ import annotations

from fedmp.report.pictures.accuracy import draw_accuracy
from fedmp.report.pictures.clock import draw_clock
from fedmp.report.pictures.data import draw_data
from fedmp.report.pictures.plan import draw_plan
from fedmp.report.pictures.timeline import draw_timeline

__all__ = ["draw_accuracy", "draw_clock", "draw_data", "draw_plan", "draw_timeline"]
