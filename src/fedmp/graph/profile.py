"""Count what each layer of a traced model costs: time, weights, activations, boundary bytes.

The graph is run once on fake tensors, so nothing is computed and a model on the meta device is counted
like any other. Times are estimated from floating-point operations and bytes moved: a call takes the
longer of the two on a device that moves one byte in the time of `FLOPS_PER_BYTE` operations. Backward
is charged with twice the forward, as usual (Kaplan et al., 2020, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fedmp.graph.batch import in_batch, size_at
from fedmp.graph.layer_graph import LayerGraph, ModeGraph, StateSpec, node_value
from fedmp.records import LayerProfile, Profile

__all__ = ["FLOPS_PER_BYTE", "profile"]

FLOPS_PER_BYTE = 8.0
_REFERENCE_FLOPS_PER_S = 1e11


def profile(graph: LayerGraph, *, batch_size: int | None = None, optimizer_copies: float = 1.0) -> Profile:
    """Profile a traced model.

    Args:
        graph: the traced model.
        batch_size: samples in one optimizer step; None for the example inputs' batch size.
        optimizer_copies: optimizer state in units of the parameters' size (SGD 0, with momentum 1, Adam 2).

    Returns:
        The costs of each layer for one sample, on a device of 100 GFLOP/s.
    """
    mode = graph.train
    num_samples = max(2, graph.batch_size)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.enable_grad():
        costs = _run(graph, mode, num_samples)
    layers = []
    for index, layer in enumerate(graph.layers):
        start, stop = mode.cuts[index], mode.cuts[index + 1]
        forward_s = sum(cost.seconds for cost in costs[start:stop]) / num_samples
        live = mode.live_at(stop).tensors if stop < len(mode.nodes) else ()
        layers.append(
            LayerProfile(
                name=layer.name,
                forward_s=forward_s,
                backward_s=2 * forward_s,
                parameters=tuple(name for name in layer.state if graph.state[name].kind == "parameter"),
                buffer_bytes=sum(
                    graph.state[name].num_bytes for name in layer.state if graph.state[name].kind != "parameter"
                ),
                activation_bytes=sum(cost.saved_bytes for cost in costs[start:stop]) / num_samples,
                boundary_bytes=sum(_num_bytes(node, mode, num_samples) for node in live) / num_samples,
                gradient_bytes=sum(
                    _num_bytes(node, mode, num_samples) for node in live if node_value(node).dtype.is_floating_point
                )
                / num_samples,
            )
        )
    return Profile(
        layers=tuple(layers),
        parameter_bytes={
            spec.name: spec.num_bytes for spec in graph.state.values() if spec.kind == "parameter"
        },
        reference_flops_per_s=_REFERENCE_FLOPS_PER_S,
        batch_size=batch_size or graph.batch_size,
        optimizer_copies=optimizer_copies,
        fingerprint=graph.fingerprint,
    )


@dataclass
class _Cost:
    """What one call costs for the whole example batch."""

    seconds: float = 0.0
    saved_bytes: int = 0


def _run(graph: LayerGraph, mode: ModeGraph, num_samples: int) -> list[_Cost]:
    """Run a graph on fake tensors, charging each call."""
    values: dict[fx.Node, Any] = {
        node: _owned(graph.state[name], node_value(node).device) for node, name in mode.state.items()
    }
    known = {tensor.untyped_storage() for tensor in values.values()}
    for node in mode.inputs:
        if node is not None:
            values[node] = _example(node_value(node), mode, num_samples)
    cost = _Cost()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in known:
            known.add(storage)
            cost.saved_bytes += storage.nbytes()
        return tensor

    costs: list[_Cost] = []
    flops_before = 0
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, _same):
        for index, node in enumerate(mode.nodes):
            cost = _Cost()
            args, kwargs = _arguments(node, mode, values)
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
            flops = counter.get_total_flops()
            moved = sum(_tensor_bytes(leaf) for leaf in tree_leaves((args, kwargs, values[node])))
            is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
            work = max(flops - flops_before, 0.0 if is_view else FLOPS_PER_BYTE * moved)
            cost.seconds = work / _REFERENCE_FLOPS_PER_S
            flops_before = flops
            costs.append(cost)
            for used in node.all_input_nodes:
                if mode.last_use.get(used) == index:
                    values.pop(used, None)
    return costs


def _owned(spec: StateSpec, device: torch.device) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device, requires_grad=spec.requires_grad)


def _example(value: torch.Tensor, mode: ModeGraph, num_samples: int) -> torch.Tensor:
    return torch.empty(_shape(value, mode, num_samples), dtype=value.dtype, device=value.device)


def _shape(value: torch.Tensor, mode: ModeGraph, num_samples: int) -> list[int]:
    """The shape of a symbolic tensor for a number of samples."""
    return [
        size if isinstance(size, int) else size_at(in_batch(size.node.expr, mode.sizes), num_samples)
        for size in value.shape
    ]


def _arguments(node: fx.Node, mode: ModeGraph, values: dict[fx.Node, Any]) -> tuple[Any, dict[str, Any]]:
    def value_of(used: fx.Node) -> Any:
        return mode.submodules[str(used.target)] if used.op == "get_attr" else values[used]

    return fx.map_arg((node.args, node.kwargs), value_of)  # type: ignore[return-value]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _tensor_bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.dtype.itemsize if isinstance(leaf, torch.Tensor) else 0


def _num_bytes(node: fx.Node, mode: ModeGraph, num_samples: int) -> int:
    value = node_value(node)
    return torch.Size(_shape(value, mode, num_samples)).numel() * int(value.dtype.itemsize)
