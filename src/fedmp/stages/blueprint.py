"""Cut one stage's program out of a traced model: what it computes, owns, takes and returns.

A blueprint is plain data and compiled graphs without weights, small enough to hand to another process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import TreeSpec

from fedmp.graph.batch import in_batch, size_at
from fedmp.graph.devices import copy_node, module_on
from fedmp.graph.layer_graph import LayerGraph, LiveSet, ModeGraph, StateSpec, node_value
from fedmp.graph.program_module import ProgramModule, program_module

__all__ = ["Program", "StageBlueprint", "ValueSpec", "draw_blueprints"]


@dataclass(frozen=True)
class ValueSpec:
    """A tensor that crosses a cut.

    Attributes:
        dtype: of the tensor.
        dims: sizes; an int, or a sympy expression of the batch size. In memory order: a tensor that is
            stored transposed crosses as it is stored, and is transposed back behind the cut.
        has_gradient: whether a gradient comes back for it in training.
    """

    dtype: torch.dtype
    dims: tuple[Any, ...]
    has_gradient: bool

    def shape(self, batch_size: int) -> tuple[int, ...]:
        """The shape for `batch_size` samples."""
        return tuple(size_at(dim, batch_size) for dim in self.dims)


@dataclass(frozen=True, eq=False)
class Program:
    """What a stage runs in one mode: `module(*state, *inputs)` returns a tuple.

    Attributes:
        module: the compiled graph; it owns no tensors.
        state: canonical names of the tensors that it takes first.
        inputs: the boundary tensors that it takes next.
        outputs: the boundary tensors that it returns; empty for the last stage, which returns the
            model's flattened result.
        out_spec: how the whole model's result is flattened in this mode.
        rules: conditions on the batch size under which the graph is right.
    """

    module: ProgramModule
    state: tuple[str, ...]
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    out_spec: TreeSpec
    rules: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class StageBlueprint:
    """Everything about a stage but its weights.

    Attributes:
        index, num_stages: its place in the pipeline.
        state: the tensors it needs, by canonical name.
        owned: names of those that it answers for: it trains them, sends them and saves them. A tied
            parameter is owned by the first stage that uses it.
        shared: for each tied parameter here, the stages that use it, the owner first.
        train, eval: its two programs.
        in_spec: how the whole model's arguments are flattened.
        out_spec: how its result is flattened in train mode; each program has its own.
        constants: the model's non-tensor arguments, by flattened position.
        traced_batch_size: of the example inputs.
    """

    index: int
    num_stages: int
    state: Mapping[str, StateSpec]
    owned: tuple[str, ...]
    shared: Mapping[str, tuple[int, ...]]
    train: Program
    eval: Program
    in_spec: TreeSpec
    out_spec: TreeSpec
    constants: Mapping[int, Any]
    traced_batch_size: int

    @property
    def is_first(self) -> bool:
        """Whether it takes the model's inputs."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it returns the model's result."""
        return self.index == self.num_stages - 1

    def program(self, *, training: bool) -> Program:
        """The program of one mode."""
        return self.train if training else self.eval


def draw_blueprints(
    graph: LayerGraph, cuts: Sequence[int], *, device: torch.device | None = None
) -> list[StageBlueprint]:
    """Cut a traced model before the given layers.

    Args:
        graph: the traced model.
        cuts: indices of the layers that start the second, third, ... stage.
        device: where tensors that the forward creates itself (masks, positions) are made; None for the
            device that the model was traced on.

    Returns:
        One blueprint a stage, in order. Each tensor of the model is owned by exactly one of them.
    """
    bounds = [0, *cuts, len(graph.layers)]
    num_stages = len(bounds) - 1
    users = _users(graph, bounds)
    blueprints = []
    for index in range(num_stages):
        state = {name: graph.state[name] for name, stages in users.items() if index in stages}
        blueprints.append(
            StageBlueprint(
                index=index,
                num_stages=num_stages,
                state=state,
                owned=tuple(name for name in state if users[name][0] == index),
                shared={
                    name: users[name]
                    for name, spec in state.items()
                    if len(users[name]) > 1 and spec.requires_grad
                },
                train=_program(graph.train, bounds, index, graph, device),
                eval=_program(graph.eval, bounds, index, graph, device),
                in_spec=graph.in_spec,
                out_spec=graph.out_spec,
                constants=graph.train.constants,
                traced_batch_size=graph.batch_size,
            )
        )
    return blueprints


def _users(graph: LayerGraph, bounds: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The stages that use each tensor, in order; an unused tensor stays with the one before it."""
    found: dict[str, set[int]] = {name: set() for name in graph.state}
    for mode in (graph.train, graph.eval):
        for index, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            for node in mode.nodes[mode.cuts[start] : mode.cuts[stop]]:
                for used in node.all_input_nodes:
                    if used in mode.state:
                        found[mode.state[used]].add(index)
        for result in mode.results:
            if isinstance(result, fx.Node) and result in mode.state:
                found[mode.state[result]].add(len(bounds) - 2)
    users: dict[str, tuple[int, ...]] = {}
    previous = 0
    for name, stages in found.items():
        users[name] = tuple(sorted(stages)) or (previous,)
        previous = users[name][0]
    return users


def _program(
    mode: ModeGraph, bounds: Sequence[int], index: int, graph: LayerGraph, device: torch.device | None
) -> Program:
    start, stop = mode.cuts[bounds[index]], mode.cuts[bounds[index + 1]]
    is_last = index == len(bounds) - 2
    before, after = mode.live_at(start), mode.live_at(stop)
    nodes = mode.nodes[start:stop]
    used = {node for call in nodes for node in call.all_input_nodes}
    if is_last:
        used.update(result for result in mode.results if isinstance(result, fx.Node))
    state = [node for node in mode.state if node in used]

    new = fx.Graph()
    built: dict[fx.Node, fx.Node] = {node: new.placeholder(node.name) for node in state}
    arriving = {node: new.placeholder(node.name) for node in before.tensors}
    for node, placeholder in arriving.items():
        built[node] = _permuted(new, placeholder, _inverse(_memory_order(node, mode)) if start else None)
    for node in before.scalars:
        received = new.placeholder(f"{node.name}_scalar")
        built[node] = new.call_function(torch.ops.aten.item.default, (received,))
    for node, (tensor, dim) in before.sizes.items():
        built[node] = new.call_function(torch.ops.aten.sym_size.int, (built[tensor], dim))

    def lookup(node: fx.Node) -> fx.Node:
        if node not in built:
            assert node.op == "get_attr"
            built[node] = new.get_attr(str(node.target))
        return built[node]

    for node in (*before.derived, *nodes):
        built[node] = copy_node(new, node, lookup, device)
    if is_last:
        results = tuple(lookup(value) if isinstance(value, fx.Node) else value for value in mode.results)
    else:
        sent = [_permuted(new, built[node], _memory_order(node, mode)) for node in after.tensors]
        results = (*sent, *(_as_tensor(new, built[node], node) for node in after.scalars))
    new.output(results)
    called = {str(node.target) for node in new.nodes if node.op in ("get_attr", "call_module")}
    gradients = _with_gradient(mode, graph)
    return Program(
        module=program_module({name: module_on(mode.submodules[name], device) for name in called}, new),
        state=tuple(mode.state[node] for node in state),
        inputs=_specs(before, gradients, mode, is_permuted=start > 0),
        outputs=() if is_last else _specs(after, gradients, mode, is_permuted=True),
        out_spec=mode.out_spec,
        rules=mode.rules,
    )


def _memory_order(node: fx.Node, mode: ModeGraph) -> tuple[int, ...] | None:
    """The dims from the slowest to the fastest in memory; None if that is their own order."""
    value = node_value(node)
    if value.layout is not torch.strided:
        return None
    sizes = [size_at(dim, 7) for dim in _dims(value.shape, mode)]
    strides = [size_at(dim, 7) for dim in _dims(value.stride(), mode)]
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)):
        return None
    wide = [dim for dim, size in enumerate(sizes) if size > 1]
    ordered = iter(sorted(wide, key=lambda dim: -strides[dim]))
    order = tuple(next(ordered) if size > 1 else dim for dim, size in enumerate(sizes))
    return None if order == tuple(range(len(order))) else order


def _inverse(order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if order is None else tuple(sorted(range(len(order)), key=order.__getitem__))


def _permuted(new: fx.Graph, node: fx.Node, order: tuple[int, ...] | None) -> fx.Node:
    if order is None:
        return node
    return new.call_function(torch.ops.aten.permute.default, (node, list(order)))


_SCALAR_TYPES = ((torch.SymInt, torch.int64), (torch.SymFloat, torch.float64), (torch.SymBool, torch.bool))


def _scalar_dtype(node: fx.Node) -> torch.dtype:
    value = node_value(node)
    return next((dtype for kind, dtype in _SCALAR_TYPES if isinstance(value, kind)), torch.int64)


def _as_tensor(new: fx.Graph, number: fx.Node, node: fx.Node) -> fx.Node:
    return new.call_function(torch.ops.aten.scalar_tensor.default, (number,), {"dtype": _scalar_dtype(node)})


def _with_gradient(mode: ModeGraph, graph: LayerGraph) -> set[fx.Node]:
    """Nodes through which a gradient may flow to some parameter."""
    flowing = {node for node, name in mode.state.items() if graph.state[name].requires_grad}
    stops = (torch.ops.aten.detach.default, torch.ops.aten.detach_.default)
    for node in mode.nodes:
        value = node_value(node)
        is_number = isinstance(value, torch.Tensor) and not value.dtype.is_floating_point
        is_number = is_number and not value.dtype.is_complex
        blocked = node.target in stops or (
            getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled" and node.args[0] is False
        )
        if not blocked and not is_number and any(used in flowing for used in node.all_input_nodes):
            flowing.add(node)
    return flowing


def _specs(
    live: LiveSet, gradients: set[fx.Node], mode: ModeGraph, *, is_permuted: bool
) -> tuple[ValueSpec, ...]:
    tensors = []
    for node in live.tensors:
        dims = _dims(node_value(node).shape, mode)
        order = _memory_order(node, mode) if is_permuted else None
        dims = dims if order is None else tuple(dims[dim] for dim in order)
        tensors.append(ValueSpec(node_value(node).dtype, dims, node in gradients))
    return (*tensors, *(ValueSpec(_scalar_dtype(node), (), False) for node in live.scalars))


def _dims(sizes: Any, mode: ModeGraph) -> tuple[Any, ...]:
    """Sizes or strides: ints, and expressions of the batch size."""
    dims: list[Any] = []
    for size in sizes:
        if isinstance(size, int):
            dims.append(size)
        else:
            expression = in_batch(size.node.expr, mode.sizes)
            dims.append(int(expression) if expression.is_number else expression)
    return tuple(dims)
