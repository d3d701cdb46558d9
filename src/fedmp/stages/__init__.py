"""Stages: a plan and a traced model become trainable modules, one a device, and back."""

from __future__ import annotations

from fedmp.stages.blueprint import Program, StageBlueprint, ValueSpec, draw_blueprints
from fedmp.stages.split import merge, model_state, run_stages, split, split_graph
from fedmp.stages.stage import Stage

__all__ = [
    "Program",
    "Stage",
    "StageBlueprint",
    "ValueSpec",
    "draw_blueprints",
    "merge",
    "model_state",
    "run_stages",
    "split",
    "split_graph",
]
