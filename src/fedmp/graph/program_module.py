"""A compiled graph that crosses to another process as it is.

`fx.GraphModule` unpickles by tracing its own code again, which runs every call that takes no traced
value: a position index or a random mask becomes a constant. Here the nodes themselves are pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = ["ProgramModule", "program_module"]


class ProgramModule(fx.GraphModule):
    """A `GraphModule` whose pickle holds its nodes. Make one with `program_module`."""

    def __reduce__(self) -> tuple[Callable[..., ProgramModule], tuple[Any, ...]]:
        called = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        return _rebuild, ({name: _attribute(self, name) for name in called}, _rows(self.graph))


def program_module(attributes: Mapping[str, Any], graph: fx.Graph) -> ProgramModule:
    """Compile a graph.

    Args:
        attributes: what its `get_attr` and `call_module` nodes name; modules keep their training flags.
        graph: of `torch.ops` calls.
    """
    module = ProgramModule(dict(attributes), graph)
    for name, child in attributes.items():  # GraphModule sets the training flag of what it is given
        if isinstance(child, torch.nn.Module) and child.training != module.get_submodule(name).training:
            module.get_submodule(name).train(child.training)
    return module


@dataclass(frozen=True)
class _Node:
    """Stands for the node of this number."""

    number: int


@dataclass(frozen=True)
class _Operator:
    """Stands for `torch.ops.NAMESPACE.NAME.OVERLOAD`; a higher-order operator has no overload."""

    namespace: str
    name: str
    overload: str

    def find(self) -> Any:
        packet = getattr(getattr(torch.ops, self.namespace), self.name)
        return getattr(packet, self.overload) if self.overload else packet


def _rows(graph: fx.Graph) -> list[tuple[Any, ...]]:
    numbers = {node: number for number, node in enumerate(graph.nodes)}

    def plain_leaf(leaf: Any) -> Any:
        return _Node(numbers[leaf]) if isinstance(leaf, fx.Node) else _named(leaf)

    def plain(value: Any) -> Any:
        return _builtin(fx.node.map_aggregate(value, plain_leaf))

    return [
        (node.op, node.name, _named(node.target), plain(node.args), plain(node.kwargs))
        for node in graph.nodes
    ]


def _named(value: Any) -> Any:
    if isinstance(value, torch._ops.OpOverload):
        namespace, name = value._schema.name.split("::")
        return _Operator(namespace, name, value._overloadname)
    if isinstance(value, torch._ops.HigherOrderOperator):
        return _Operator("higher_order", value.name(), "")
    return value


def _builtin(value: Any) -> Any:
    """fx's immutable lists and dicts as plain ones."""
    if isinstance(value, tuple):
        parts = [_builtin(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_builtin(part) for part in value]
    if isinstance(value, dict):
        return {key: _builtin(part) for key, part in value.items()}
    return value


def _rebuild(attributes: Mapping[str, Any], rows: list[tuple[Any, ...]]) -> ProgramModule:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def restored(leaf: Any) -> Any:
        if isinstance(leaf, _Node):
            return nodes[leaf.number]
        return leaf.find() if isinstance(leaf, _Operator) else leaf

    for op, name, target, args, kwargs in rows:
        args, kwargs = fx.node.map_aggregate(args, restored), fx.node.map_aggregate(kwargs, restored)
        nodes.append(graph.create_node(op, restored(target), args, kwargs, name))
    return program_module(attributes, graph)


def _attribute(module: torch.nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found
