"""Measure on this machine how long each layer of a traced model takes, forward and backward.

Each layer is compiled as a graph of its own and run with real tensors at one micro-batch size: small
products use a machine less well than large ones, so times at another size would mislead.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fedmp.graph.devices import copy_node, module_on
from fedmp.graph.estimate import shape_at
from fedmp.graph.layer_graph import LayerGraph, ModeGraph, node_value

__all__ = ["LayerTime", "measure_flops_per_s", "measure_layers"]


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one micro-batch: medians of warm runs."""

    forward_s: float
    backward_s: float


def measure_flops_per_s(*, size: int = 768, repeats: int = 7) -> float:
    """The speed of this machine's matrix product in float32: what to give `Device` as `flops_per_s`.

    Args:
        size: rows and columns of the matrices.
        repeats: timed runs, of which the median counts.
    """
    first, second = torch.ones(size, size), torch.ones(size, size)
    return 2 * size**3 / _median_s(lambda: first @ second, repeats)


def measure_layers(
    graph: LayerGraph, model: nn.Module, microbatch_size: int, *, repeats: int = 5, seed: int = 0
) -> list[LayerTime]:
    """Time each layer in train mode.

    Args:
        graph: the traced model.
        model: with its weights; it is not changed.
        microbatch_size: samples in one run.
        repeats: timed runs of each layer, of which the median counts.
        seed: of the made-up inputs.

    Raises:
        ValueError: the model is on the meta device.
    """
    model = copy.deepcopy(model)
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters(remove_duplicate=False))}
    tensors.update(model.named_buffers(remove_duplicate=False))
    tensors.update(graph.constants)
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError(
            f"{graph.model_name} is on the meta device, so nothing can be measured; use method='flops'"
        )
    mode = graph.train
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    values: dict[fx.Node, Any] = {node: tensors[name] for node, name in mode.state.items()}
    for node in mode.inputs:
        if node is not None:
            values[node] = _made_up(node, mode, microbatch_size, generator).to(device)
    times = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for start, stop in zip(mode.cuts[:-1], mode.cuts[1:], strict=True):
            times.append(_time_layer(mode, start, stop, values, device, repeats))
    return times


def _made_up(node: fx.Node, mode: ModeGraph, num_samples: int, generator: torch.Generator) -> torch.Tensor:
    value = node_value(node)
    shape = shape_at(value, mode, num_samples)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(value.dtype)
    return torch.ones(shape, dtype=value.dtype)


def _time_layer(
    mode: ModeGraph, start: int, stop: int, values: dict[fx.Node, Any], device: torch.device, repeats: int
) -> LayerTime:
    """Run one layer; its results join `values`."""
    module, taken, made = _compile(mode, start, stop, device)
    given = {*mode.state, *mode.inputs}
    backward_s: list[float] = []
    results: Sequence[Any] = ()

    def once() -> float:
        nonlocal results
        inputs = [_leaf(values[node]) if node not in given else values[node] for node in taken]
        begin_s = time.perf_counter()
        results = module(*inputs)
        forward_s = time.perf_counter() - begin_s
        roots = [result for result in results if isinstance(result, torch.Tensor) and result.requires_grad]
        gradients = [torch.ones_like(root) for root in roots]
        begin_s = time.perf_counter()
        if roots:
            torch.autograd.backward(roots, gradients)
        backward_s.append(time.perf_counter() - begin_s)
        return forward_s

    once()
    backward_s.clear()
    forward = statistics.median(once() for _ in range(max(1, repeats)))
    for node, result in zip(made, results, strict=True):
        values[node] = result.detach() if isinstance(result, torch.Tensor) else result
    for node in list(values):
        if mode.last_use.get(node, -1) < stop:
            del values[node]
    return LayerTime(forward, statistics.median(backward_s))


def _compile(
    mode: ModeGraph, start: int, stop: int, device: torch.device
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """A layer as a module, the nodes that it takes, and those that it gives to later layers."""
    nodes = mode.nodes[start:stop]
    inside = set(nodes)
    used = dict.fromkeys(node for call in nodes for node in call.all_input_nodes)
    taken = [node for node in used if node not in inside and node.op != "get_attr"]
    made = [node for node in nodes if mode.last_use.get(node, -1) >= stop]
    new = fx.Graph()
    built = {node: new.placeholder(node.name) for node in taken}

    def lookup(node: fx.Node) -> fx.Node:
        if node not in built:
            built[node] = new.get_attr(str(node.target))
        return built[node]

    for node in nodes:
        built[node] = copy_node(new, node, lookup, device)
    new.output(tuple(built[node] for node in made))
    called = {str(node.target) for node in new.nodes if node.op in ("get_attr", "call_module")}
    return (
        fx.GraphModule({name: module_on(mode.submodules[name], device) for name in called}, new),
        taken,
        made,
    )


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex):
        return value.detach().requires_grad_()
    return value


def _median_s(run: Callable[[], Any], repeats: int) -> float:
    run()
    times = []
    for _ in range(max(1, repeats)):
        begin_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times)
