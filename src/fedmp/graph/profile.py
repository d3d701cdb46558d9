"""Count what each layer of a traced model costs: time, weights, activations, boundary bytes.

Bytes are always counted on fake tensors. Times are estimated the same way, so that a model on the meta
device is profiled like any other, or measured on this machine. An estimated backward is charged with
twice the forward, as usual (Kaplan et al., 2020, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn

from fedmp.graph.estimate import FLOPS_PER_BYTE, CallCost, estimate_calls, shape_at
from fedmp.graph.layer_graph import LayerGraph, ModeGraph, StateSpec, node_value
from fedmp.graph.measure import (
    LayerTime,
    measure_flops_per_s,
    measure_layers,
    measure_update_s_per_byte,
)
from fedmp.records import LayerProfile, Profile

__all__ = ["REFERENCE_FLOPS_PER_S", "estimated_profile", "profile"]

REFERENCE_FLOPS_PER_S = 1e11
# kernels that are loaded or compiled when first used, and small buffers: 3 to 10 MiB in processes that trained
# models of a few kB with torch 2.13 (benchmarks/costs.py)
_PROCESS_BYTES = 5 << 20


def profile(
    graph: LayerGraph,
    *,
    batch_size: int | None = None,
    optimizer_copies: float = 1.0,
    method: Literal["flops", "measured"] = "flops",
    model: nn.Module | None = None,
    microbatch_size: int | None = None,
) -> Profile:
    """Profile a traced model.

    Args:
        graph: the traced model.
        batch_size: samples in one optimizer step; None for the example inputs' batch size.
        optimizer_copies: optimizer state in units of the parameters' size (SGD 0, with momentum 1, Adam 2).
        method: "flops" estimates times for a device of 100 GFLOP/s; "measured" runs every layer here, and
            the reference device is this machine.
        model: its weights, for "measured".
        microbatch_size: samples in one measured run; None for the example inputs' batch size.

    Returns:
        The costs of each layer for one sample.

    Raises:
        ValueError: the method is unknown, or "measured" lacks a model with weights in memory.
    """
    if method not in ("flops", "measured"):
        raise ValueError(f"method is {method!r}; it must be 'flops' or 'measured'")
    if method == "measured" and model is None:
        raise ValueError("method='measured' needs the model: profile(graph, method='measured', model=model)")
    num_samples = max(2, graph.batch_size)
    calls = estimate_calls(graph.train, graph.state, num_samples)
    if method == "measured" and model is not None:
        size = microbatch_size or graph.batch_size
        measured = measure_layers(graph, model, size)
        times = [LayerTime(time.forward_s / size, time.backward_s / size) for time in measured]
        changes: dict[str, Any] = {
            "reference_flops_per_s": measure_flops_per_s(),
            "update_s_per_byte": measure_update_s_per_byte(optimizer_copies),
        }
    else:
        times = _estimated_times(graph, calls, num_samples)
        changes = {}
    profiled = estimated_profile(
        tuple(_layer(graph, index, calls, times[index], num_samples) for index in range(len(times))),
        graph.state,
        batch_size=batch_size or graph.batch_size,
        optimizer_copies=optimizer_copies,
    )
    return profiled.model_copy(update={**changes, "method": method, "fingerprint": graph.fingerprint})


def estimated_profile(
    layers: tuple[LayerProfile, ...],
    specs: Mapping[str, StateSpec],
    *,
    batch_size: int,
    optimizer_copies: float,
) -> Profile:
    """A profile of layers whose times are estimated, for a device of 100 GFLOP/s.

    Args:
        layers: what each costs.
        specs: of the model's tensors.
        batch_size: samples in one optimizer step.
        optimizer_copies: optimizer state in units of the parameters' size.
    """
    return Profile(
        layers=layers,
        parameter_bytes={spec.name: spec.num_bytes for spec in specs.values() if spec.kind == "parameter"},
        reference_flops_per_s=REFERENCE_FLOPS_PER_S,
        batch_size=batch_size,
        optimizer_copies=optimizer_copies,
        # a copy is scaled (2 accesses) and added to (3), and then the weights are (3)
        update_s_per_byte=(5 * optimizer_copies + 3) * FLOPS_PER_BYTE / REFERENCE_FLOPS_PER_S,
        process_bytes=_PROCESS_BYTES,
    )


def _estimated_times(graph: LayerGraph, calls: Sequence[CallCost], num_samples: int) -> list[LayerTime]:
    cuts = graph.train.cuts
    times = []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        forward_s = sum(call.flops for call in calls[start:stop]) / REFERENCE_FLOPS_PER_S / num_samples
        times.append(LayerTime(forward_s, 2 * forward_s))
    return times


def _layer(
    graph: LayerGraph, index: int, calls: Sequence[CallCost], time: LayerTime, num_samples: int
) -> LayerProfile:
    layer, mode = graph.layers[index], graph.train
    start, stop = mode.cuts[index], mode.cuts[index + 1]
    is_last = stop == len(mode.nodes)
    live = () if is_last else mode.live_at(stop).tensors
    real = [node for node in live if node_value(node).dtype.is_floating_point]
    later = {node: size for call in calls[stop:] for node, size in call.saves.items()}
    loss_bytes = sum(_num_bytes(node, mode, num_samples) for node in _real_results(mode)) if is_last else 0
    return LayerProfile(
        name=layer.name,
        forward_s=time.forward_s,
        backward_s=time.backward_s,
        parameters=tuple(name for name in layer.state if graph.state[name].kind == "parameter"),
        buffer_bytes=sum(
            graph.state[name].num_bytes for name in layer.state if graph.state[name].kind != "parameter"
        ),
        # a loss keeps about as much as it is given, such as the logarithms of probabilities
        activation_bytes=(sum(call.saved_bytes for call in calls[start:stop]) + loss_bytes) / num_samples,
        workspace_bytes=max(call.transient_bytes for call in calls[start:stop]) / num_samples,
        boundary_bytes=sum(_num_bytes(node, mode, num_samples) for node in live) / num_samples,
        gradient_bytes=sum(_num_bytes(node, mode, num_samples) for node in real) / num_samples,
        reused_bytes=sum(later.get(node, 0.0) for node in live) / num_samples,
        must_cut_after=layer.must_cut_after,
        device=layer.device,
    )


def _real_results(mode: ModeGraph) -> list[fx.Node]:
    found = dict.fromkeys(result for result in mode.results if isinstance(result, fx.Node))
    values = {node: node_value(node) for node in found}
    return [
        node
        for node, value in values.items()
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    ]


def _num_bytes(node: fx.Node, mode: ModeGraph, num_samples: int) -> int:
    value = node_value(node)
    return torch.Size(shape_at(value, mode, num_samples)).numel() * int(value.dtype.itemsize)
