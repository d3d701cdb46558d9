"""Models as graphs: trace a module, find its layers, and count what each costs."""

from __future__ import annotations

from fedmp.graph.layer_graph import Layer, LayerGraph, StateSpec
from fedmp.graph.profile import profile
from fedmp.graph.trace import trace

__all__ = ["Layer", "LayerGraph", "StateSpec", "profile", "trace"]
