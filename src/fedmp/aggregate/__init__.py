"""Aggregators: many clients' updates become one."""

from __future__ import annotations

from fedmp.aggregate.mean import Aggregator, WeightedMean

__all__ = ["Aggregator", "WeightedMean"]
