"""From an `nn.Module` and example inputs to a `LayerGraph`.

The model is exported twice with `torch.export`, once in train and once in eval mode, because dropout,
batch norm and Python branches on `self.training` make two programs of one model. Nothing is computed:
tracing works on shapes alone, so a model on the meta device is traced like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils._pytree import tree_flatten, tree_map

from fedmp.errors import TraceError
from fedmp.graph.functionalize import functionalize
from fedmp.graph.layer_graph import LayerGraph, ModeGraph, StateSpec
from fedmp.graph.layers import Span, find_layers

__all__ = ["trace"]


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> LayerGraph:
    """Trace a model's forward.

    Args:
        model: any module whose forward takes tensors (and constants) and returns tensors, or tuples,
            dicts or registered dataclasses of them. Neither it nor its mode is changed.
        args: example positional inputs. The first dim of every tensor that has as many entries there
            as the first tensor is the batch; stages accept any batch size.
        kwargs: example keyword inputs.

    Returns:
        The graph with its layers and possible cuts.

    Raises:
        TraceError: the forward cannot be traced; the message names the module and the reason.

    Example:
        >>> graph = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.zeros(3, 4),))
        >>> [layer.name for layer in graph.layers]
        ['0', '2']
    """
    kwargs = dict(kwargs or {})
    batch_size = _batch_size(model, args, kwargs)
    state = _state_specs(model)
    was_training = {name: module.training for name, module in model.named_modules()}
    try:
        programs = {}
        for training in (True, False):
            model.train(training)
            programs[training] = _export(model, args, kwargs, batch_size)
    finally:
        for name, module in model.named_modules():
            module.training = was_training[name]
    constants: dict[str, torch.Tensor] = {}
    train, train_spans = _mode_graph(programs[True], state, constants)
    evaluation, eval_spans = _mode_graph(programs[False], state, constants)
    layout = find_layers(train, train_spans, evaluation, eval_spans)
    out_spec = programs[True].call_spec.out_spec
    if out_spec != programs[False].call_spec.out_spec:
        raise TraceError(
            f"{type(model).__name__} returns another structure in train than in eval mode "
            f"({out_spec} and {programs[False].call_spec.out_spec}); return the same in both"
        )
    return LayerGraph(
        model_name=type(model).__name__,
        state=state,
        constants=constants,
        layers=layout.layers,
        train=dataclasses.replace(train, cuts=layout.train_cuts),
        eval=dataclasses.replace(evaluation, cuts=layout.eval_cuts),
        in_spec=programs[True].call_spec.in_spec,
        out_spec=out_spec,
        batch_size=batch_size,
        fingerprint=_fingerprint(state, train),
    )


def _batch_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    first = next((tensor for tensor in tensors if tensor.dim() > 0), None)
    if first is None or first.shape[0] == 0:
        raise TraceError(
            f"tracing {type(model).__name__} needs at least one example tensor with a batch dim and one "
            f"sample, not {[tuple(tensor.shape) for tensor in tensors]}"
        )
    return int(first.shape[0])


def _state_specs(model: nn.Module) -> dict[str, StateSpec]:
    parameters = list(model.named_parameters(remove_duplicate=False))
    buffers = list(model.named_buffers(remove_duplicate=False))
    persistent = set(model.state_dict(keep_vars=True))
    names: dict[int, list[str]] = {}
    for name, tensor in parameters + buffers:
        names.setdefault(id(tensor), []).append(name)
    specs: dict[str, StateSpec] = {}
    for kind, tensors in (("parameter", parameters), ("buffer", buffers)):
        for _, tensor in tensors:
            aliases = tuple(names[id(tensor)])
            specs.setdefault(
                aliases[0],
                StateSpec(
                    name=aliases[0],
                    aliases=aliases,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    kind=kind,  # type: ignore[arg-type]
                    is_persistent=aliases[0] in persistent,
                    requires_grad=tensor.requires_grad and kind == "parameter",
                ),
            )
    return specs


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int
) -> torch.export.ExportedProgram:
    device = next((tensor.device for tensor in model.state_dict(keep_vars=True).values()), None)

    def example(leaf: Any) -> Any:
        # fresh tensors: two inputs that are one object would be traced as one input
        if not isinstance(leaf, torch.Tensor):
            return leaf
        shape = list(leaf.shape)
        if batch_size == 1 and leaf.dim() > 0 and shape[0] == 1:
            shape[0] = 2  # a size of one would be taken for a constant
        return torch.empty(shape, dtype=leaf.dtype, device=device or leaf.device)

    def dynamic(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch_size:
            return {0: torch.export.Dim.AUTO}
        return None

    executing: list[tuple[str, nn.Module]] = []
    try:
        with _watch_calls(model, executing):
            return torch.export.export(
                model,
                tree_map(example, args),
                tree_map(example, kwargs),
                dynamic_shapes=_dynamic_shapes(model, args, kwargs, dynamic),
                strict=False,
            )
    except Exception as error:  # torch.export raises its own, the model's, and its dependencies' errors
        raise TraceError(_explain(model, executing, error)) from error


def _dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> Any:
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TraceError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    return tree_map(dynamic, dict(bound))


@contextlib.contextmanager
def _watch_calls(model: nn.Module, executing: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep the stack of modules whose forward is running, so that an error can be placed."""
    handles = []
    for name, module in model.named_modules():
        entry = (name, module)
        handles.append(module.register_forward_pre_hook(lambda *_, entry=entry: executing.append(entry)))
        handles.append(module.register_forward_hook(lambda *_: executing.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _explain(model: nn.Module, executing: list[tuple[str, nn.Module]], error: Exception) -> str:
    name, module = executing[-1] if executing else ("", model)
    where = f"module {name!r} ({type(module).__name__})" if name else f"{type(model).__name__}.forward"
    line = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and "/fedmp/graph/" not in frame.filename and frame.line:
            line = f", at `{frame.line}` ({frame.filename}:{frame.lineno})"
            break
    reason = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
    return (
        f"cannot trace {type(model).__name__}: {where}{line}: {reason.strip()[:300]}; the forward must be a "
        f"fixed sequence of tensor operations: no branches on tensor values, no .item(), no NumPy"
    )


def _mode_graph(
    program: torch.export.ExportedProgram, state: dict[str, StateSpec], constants: dict[str, torch.Tensor]
) -> tuple[ModeGraph, list[Span]]:
    canonical = {alias: spec.name for spec in state.values() for alias in spec.aliases}
    graph = program.graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    owned: dict[fx.Node, str] = {}
    inputs: list[fx.Node | None] = []
    fixed: dict[int, Any] = {}
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, ConstantArgument):
            fixed[len(inputs)] = spec.arg.value
            inputs.append(None)
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            owned[node] = canonical[str(spec.target)]
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            tensor = program.constants[str(spec.target)]
            owned[node] = _add_constant(state, constants, str(spec.target), tensor)
        else:
            raise TraceError(f"input {node.name} of kind {spec.kind.name} is not a tensor; pass tensors only")
    spans = functionalize(graph, set(owned))
    nodes = tuple(node for node in graph.nodes if node.op == "call_function")
    submodules = {
        str(node.target): program.graph_module.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "get_attr"
    }
    return ModeGraph(graph, nodes, owned, tuple(inputs), fixed, submodules, cuts=()), spans


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
        digest.update(f"{node.target} {node.args} {node.kwargs}\n".encode())
    return digest.hexdigest()[:16]
