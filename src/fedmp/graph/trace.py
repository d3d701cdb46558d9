"""From an `nn.Module` and example inputs to a `LayerGraph`.

The model is exported twice with `torch.export`, once in train and once in eval mode, because dropout,
batch norm and Python branches on `self.training` make two programs of one model (once if they make no
difference). Nothing is computed:
tracing works on shapes alone, so a model on the meta device is traced like any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from fedmp.errors import TraceError
from fedmp.graph.cut_rules import CutRules, apply_cut_rules
from fedmp.graph.export import Exported, export_mode
from fedmp.graph.flat import FlatInputs, flatten_inputs
from fedmp.graph.functionalize import functionalize
from fedmp.graph.layer_graph import LayerGraph, ModeGraph, StateSpec
from fedmp.graph.layers import Span, find_layers
from fedmp.graph.leaf import Chain, find_leaves
from fedmp.graph.modes import is_same_in_both_modes
from fedmp.graph.specs import state_specs

__all__ = ["trace"]


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    leaves: Sequence[str] = (),
    cut_rules: CutRules | None = None,
) -> LayerGraph:
    """Trace a model's forward.

    Args:
        model: any module whose forward takes tensors (and constants) and returns tensors, or trees of
            them: tuples, dicts, dataclasses, caches. Neither it nor its mode is changed.
        args: example positional inputs. The first dim of every tensor that has as many entries there
            as the first tensor is the batch; stages accept any batch size.
        kwargs: example keyword inputs.
        leaves: path patterns (as in `fnmatch`) of modules that are not traced into. Each is one opaque
            node, which runs the original module in its stage. The modules of a `Chain` are leaves.
        cut_rules: where plans may cut; None anywhere.

    Returns:
        The graph with its layers and possible cuts.

    Raises:
        TraceError: the forward cannot be traced (the message names the module, the reason and ways out), or
            a leaf pattern matches no module.
        PlanError: the cut rules cannot be kept.

    Example:
        >>> graph = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.zeros(3, 4),))
        >>> [layer.name for layer in graph.layers]
        ['0', '2']
    """
    inputs = flatten_inputs(model, args, kwargs or {})
    state = state_specs(model)
    opaque = find_leaves(model, [*leaves, "*"] if isinstance(model, Chain) else leaves)
    was_training = {name: module.training for name, module in model.named_modules()}
    try:
        model.train()
        programs = [export_mode(model, inputs, opaque)]
        if programs[0].has_leaves or not is_same_in_both_modes(model, inputs):
            model.eval()
            programs.append(export_mode(model, inputs, opaque))
    finally:
        for name, module in model.named_modules():
            module.training = was_training.get(name, was_training[""])  # a forward may add modules
    constants: dict[str, torch.Tensor] = {}
    modes = [_mode_graph(program, inputs, state, constants) for program in programs]
    (train, train_spans), (evaluation, eval_spans) = modes[0], modes[-1]
    layout = find_layers(train, train_spans, evaluation, eval_spans)
    graph = LayerGraph(
        model_name=type(model).__name__,
        state=state,
        constants=constants,
        layers=layout.layers,
        train=dataclasses.replace(train, cuts=layout.train_cuts),
        eval=dataclasses.replace(evaluation, cuts=layout.eval_cuts),
        in_spec=inputs.spec,
        out_spec=train.out_spec,
        batch_size=inputs.batch_size,
        fingerprint=_fingerprint(state, train),
    )
    return graph if cut_rules is None else apply_cut_rules(graph, cut_rules)


def _mode_graph(
    exported: Exported, inputs: FlatInputs, state: dict[str, StateSpec], constants: dict[str, torch.Tensor]
) -> tuple[ModeGraph, list[Span]]:
    canonical = {alias: spec.name for spec in state.values() for alias in spec.aliases}
    program = exported.program
    graph = program.graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    owned: dict[fx.Node, str] = {}
    tensors: list[fx.Node] = []
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            tensors.append(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            owned[node] = canonical[str(spec.target)]
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            tensor = program.constants[str(spec.target)]
            owned[node] = _add_constant(state, constants, str(spec.target), tensor)
        else:
            raise TraceError(f"input {node.name} of kind {spec.kind.name} is not a tensor; pass tensors only")
    spans = functionalize(graph, set(owned))
    nodes = tuple(node for node in graph.nodes if node.op in ("call_function", "call_module"))
    submodules = {
        str(node.target): program.graph_module.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    given = iter(tensors)
    places = range(inputs.spec.num_leaves)
    mode = ModeGraph(
        graph=graph,
        nodes=nodes,
        state=owned,
        inputs=tuple(None if place in inputs.constants else next(given) for place in places),
        constants=inputs.constants,
        results=_results(exported, graph),
        out_spec=exported.out_spec,
        submodules=submodules,
        sizes=exported.sizes,
        rules=exported.rules,
        cuts=(),
    )
    return mode, spans


def _results(exported: Exported, graph: fx.Graph) -> tuple[Any, ...]:
    """The flattened result: nodes, and constants where the model returned something else than tensors."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    made = iter(output.args[0])
    fixed = exported.out_constants
    return tuple(fixed[i] if i in fixed else next(made) for i in range(exported.out_spec.num_leaves))


def _add_constant(
    state: dict[str, StateSpec], constants: dict[str, torch.Tensor], target: str, tensor: torch.Tensor
) -> str:
    """Register a tensor that is neither parameter nor buffer; equal ones of the two modes share a name."""
    value = tensor.detach()
    name, count = target, 1
    while name in state and not (name in constants and _is_same(constants[name], value)):
        count += 1
        name = f"{target}_{count}"
    constants[name] = value
    state.setdefault(
        name,
        StateSpec(
            name=name,
            aliases=(name,),
            shape=tuple(value.shape),
            dtype=value.dtype,
            kind="constant",
            is_persistent=False,
            requires_grad=False,
        ),
    )
    return name


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.is_meta or second.is_meta:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)


def _fingerprint(state: Mapping[str, StateSpec], train: ModeGraph) -> str:
    digest = hashlib.sha256()
    for spec in state.values():
        digest.update(f"{spec.name} {spec.shape} {spec.dtype} {spec.requires_grad}\n".encode())
    for node in train.nodes:
        # where a tensor is made is no part of the architecture: a model may be traced on the meta device
        kwargs = {name: value for name, value in node.kwargs.items() if not isinstance(value, torch.device)}
        digest.update(f"{node.target} {node.args} {kwargs}\n".encode())
    return digest.hexdigest()[:16]
