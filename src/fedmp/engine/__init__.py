"""Engines: one job, run in one process or over real processes."""

from __future__ import annotations

from fedmp.engine.job import Centralized, Engine, Job, Result

__all__ = ["Centralized", "Engine", "Job", "Result"]
