"""Let a traced graph make its own tensors (masks, positions) on another device than it was traced on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from fedmp.graph.program_module import program_module

__all__ = ["copy_node", "module_on", "on_device"]


def on_device(tree: Any, device: torch.device | None) -> Any:
    """Arguments of a call with every device replaced; None changes nothing."""
    if device is None:
        return tree
    return tree_map(lambda value: device if isinstance(value, torch.device) else value, tree)


def copy_node(
    new: fx.Graph, node: fx.Node, lookup: Callable[[fx.Node], fx.Node], device: torch.device | None
) -> fx.Node:
    """Copy a node into another graph, for `device`."""
    copied = new.node_copy(node, lookup)
    copied.args, copied.kwargs = on_device(copied.args, device), on_device(copied.kwargs, device)
    return copied


def module_on(module: Any, device: torch.device | None) -> Any:
    """A graph that a node calls, with the tensors that it creates on `device`; anything else as it is."""
    if not isinstance(module, fx.GraphModule):
        return module
    new = fx.Graph()
    built: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        built[node] = copy_node(new, node, built.__getitem__, device)
    called = {str(node.target) for node in new.nodes if node.op in ("get_attr", "call_module")}
    return program_module({name: module_on(module.get_submodule(name), device) for name in called}, new)
