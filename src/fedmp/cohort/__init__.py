"""Cohorts: many clients trained at once in one process, by the model's own forward on stacked tensors."""

from __future__ import annotations

from fedmp.cohort import elementwise, layers, losses, shapes
from fedmp.cohort.carried import Memory
from fedmp.cohort.chunk import ChunkWork
from fedmp.cohort.module import FlatLayout, flat_layout, own_statistics
from fedmp.cohort.objective import Objective
from fedmp.cohort.optimizers import FlatOptimizer, flat_optimizer
from fedmp.cohort.probe import Probe, cutting_matters, probe
from fedmp.cohort.registry import CannotStackError, batched_rule
from fedmp.cohort.stacked import Stacked
from fedmp.cohort.start import RoundStart
from fedmp.cohort.threads import is_small, one_thread
from fedmp.cohort.training import Cohort, CohortResult, CohortTraining

__all__ = [
    "CannotStackError",
    "ChunkWork",
    "Cohort",
    "CohortResult",
    "CohortTraining",
    "FlatLayout",
    "FlatOptimizer",
    "Memory",
    "Objective",
    "Probe",
    "RoundStart",
    "Stacked",
    "batched_rule",
    "cutting_matters",
    "flat_layout",
    "flat_optimizer",
    "is_small",
    "one_thread",
    "own_statistics",
    "probe",
]

for _rules in (shapes, elementwise, layers, losses):
    _rules.register()
