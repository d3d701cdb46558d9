"""Models as graphs: trace a module, find its layers, and count what each costs."""

from __future__ import annotations

from fedmp.graph.calls import Running, watch_calls, where_it_failed
from fedmp.graph.cut_rules import CutRules, apply_cut_rules
from fedmp.graph.layer_graph import Layer, LayerGraph, StateSpec
from fedmp.graph.leaf import Chain
from fedmp.graph.measure import measure_flops_per_s
from fedmp.graph.profile import profile
from fedmp.graph.specs import named_tensors, state_specs
from fedmp.graph.trace import trace
from fedmp.graph.whole import forward_flops, profile_whole

__all__ = [
    "Chain",
    "CutRules",
    "Layer",
    "LayerGraph",
    "Running",
    "StateSpec",
    "apply_cut_rules",
    "forward_flops",
    "measure_flops_per_s",
    "named_tensors",
    "profile",
    "profile_whole",
    "state_specs",
    "trace",
    "watch_calls",
    "where_it_failed",
]
