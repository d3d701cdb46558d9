"""Cut one stage's program out of a traced model: what it computes, owns, takes and returns.

A blueprint is plain data and compiled graphs without weights, small enough to hand to another process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import TreeSpec, tree_map

from fedmp.graph.layer_graph import LayerGraph, LiveSet, ModeGraph, StateSpec, node_value

__all__ = ["Program", "StageBlueprint", "ValueSpec", "draw_blueprints"]


@dataclass(frozen=True)
class ValueSpec:
    """A tensor that crosses a cut.

    Attributes:
        dtype: of the tensor.
        dims: sizes; an int, or a sympy expression of the batch size.
        has_gradient: whether a gradient comes back for it in training.
    """

    dtype: torch.dtype
    dims: tuple[Any, ...]
    has_gradient: bool

    def shape(self, batch_size: int) -> tuple[int, ...]:
        """The shape for `batch_size` samples."""
        return tuple(
            dim if isinstance(dim, int) else int(dim.xreplace(dict.fromkeys(dim.free_symbols, batch_size)))
            for dim in self.dims
        )


@dataclass(frozen=True, eq=False)
class Program:
    """What a stage runs in one mode: `module(*state, *inputs)` returns a tuple.

    Attributes:
        module: the compiled graph; it owns no tensors.
        state: canonical names of the tensors that it takes first.
        inputs: the boundary tensors that it takes next.
        outputs: the boundary tensors that it returns; empty for the last stage, which returns the
            model's flattened result.
    """

    module: fx.GraphModule
    state: tuple[str, ...]
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]


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
        in_spec, out_spec: how the whole model's arguments and result are flattened.
        constants: the model's non-tensor arguments, by flattened position.
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
    built: dict[fx.Node, fx.Node] = {node: new.placeholder(node.name) for node in (*state, *before.tensors)}
    for node in before.scalars:
        received = new.placeholder(f"{node.name}_scalar")
        built[node] = new.call_function(torch.ops.aten.item.default, (received,))
    for node, (tensor, dim) in before.sizes.items():
        built[node] = new.call_function(torch.ops.aten.sym_size.int, (built[tensor], dim))

    def lookup(node: fx.Node) -> fx.Node:
        if node not in built:
            assert node.op == "get_attr"
            built[node] = new.get_attr(node.target)
        return built[node]

    for node in (*before.derived, *nodes):
        built[node] = _copy(new, node, lookup, device)
    if is_last:
        results = tuple(lookup(value) if isinstance(value, fx.Node) else value for value in mode.results)
    else:
        results = (*(built[node] for node in after.tensors), *(_as_tensor(new, built[n]) for n in after.scalars))
    new.output(results)
    called = {str(node.target) for node in new.nodes if node.op == "get_attr"}
    root = {name: mode.submodules[name] for name in called}
    gradients = _with_gradient(mode, graph)
    return Program(
        module=fx.GraphModule(root, new),
        state=tuple(mode.state[node] for node in state),
        inputs=_specs(before, gradients),
        outputs=() if is_last else _specs(after, gradients),
    )


def _copy(new: fx.Graph, node: fx.Node, lookup: Any, device: torch.device | None) -> fx.Node:
    copied = new.node_copy(node, lookup)
    if device is not None:
        swap = lambda value: device if isinstance(value, torch.device) else value  # noqa: E731
        copied.args, copied.kwargs = tree_map(swap, copied.args), tree_map(swap, copied.kwargs)
    return copied


def _as_tensor(new: fx.Graph, number: fx.Node) -> fx.Node:
    return new.call_function(torch.ops.aten.scalar_tensor.default, (number,), {"dtype": torch.int64})


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


def _specs(live: LiveSet, gradients: set[fx.Node]) -> tuple[ValueSpec, ...]:
    tensors = tuple(
        ValueSpec(node_value(node).dtype, _dims(node_value(node)), node in gradients) for node in live.tensors
    )
    return tensors + tuple(ValueSpec(torch.int64, (), False) for _ in live.scalars)


def _dims(value: torch.Tensor) -> tuple[Any, ...]:
    dims: list[Any] = []
    for size in value.shape:
        if isinstance(size, int):
            dims.append(size)
        else:
            expression = size.node.expr
            dims.append(int(expression) if expression.is_number else expression)
    return tuple(dims)


