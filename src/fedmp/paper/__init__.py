"""Centralized training against the federation, in one table: the same model and data, real training of both, the
time of both by the same simulated hardware. A job and its assumptions come in; a table, curves over the
assumptions and pictures go out."""

from __future__ import annotations

from fedmp.paper.curves import CurvePoint, compute_curves
from fedmp.paper.settings import PaperSettings, Variations
from fedmp.paper.study import PaperResult, run_paper
from fedmp.paper.table import PaperRow, paper_table

__all__ = [
    "CurvePoint",
    "PaperResult",
    "PaperRow",
    "PaperSettings",
    "Variations",
    "compute_curves",
    "paper_table",
    "run_paper",
]
