"""Measure on this machine how long each layer of a traced model takes, forward and backward.

Each layer is compiled as a graph of its own. Passes then go through all layers, forward and back, as a
pipeline's micro-batches do, and gradients accumulate as they do there: a layer repeated by itself would find
its weights in the processor's cache. Tensors are of one micro-batch, for small products use a machine less
well than large ones. With one thread the clock is the thread's own, which other processes do not lengthen.
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

from fedmp.graph.deferred import LARGE_WEIGHT, WeightGradients, deferred_module
from fedmp.graph.devices import copy_node, module_on
from fedmp.graph.estimate import shape_at
from fedmp.graph.layer_graph import LayerGraph, ModeGraph, node_value
from fedmp.graph.specs import named_tensors

__all__ = ["LayerTime", "measure_flops_per_s", "measure_layers", "measure_update_s_per_byte"]


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


def measure_update_s_per_byte(copies: float, *, size: int = 1 << 22, repeats: int = 5) -> float:
    """Seconds that an optimizer's step takes for each byte of parameters.

    Args:
        copies: optimizer state in units of the parameters' size, each kept as a running mean.
        size: elements to update.
        repeats: timed runs, of which the median counts.
    """
    weights, gradients = torch.zeros(size), torch.ones(size)
    means = [torch.zeros(size) for _ in range(round(copies))]

    def update() -> None:
        for mean in means:
            mean.mul_(0.9).add_(gradients)
        weights.add_(means[0] if means else gradients, alpha=-0.1)

    return _median_s(update, repeats) / (weights.numel() * weights.itemsize)


def measure_layers(
    graph: LayerGraph, model: nn.Module, microbatch_size: int, *, repeats: int = 5, seed: int = 0
) -> list[LayerTime]:
    """Time each layer in train mode.

    Args:
        graph: the traced model.
        model: with its weights; it is not changed.
        microbatch_size: samples in one run.
        repeats: timed passes, of which each layer's median counts.
        seed: of the made-up inputs.

    Raises:
        ValueError: the model is on the meta device.
    """
    model = copy.deepcopy(model)
    tensors = {**named_tensors(model), **graph.constants}
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
    layers = [
        _compile(mode, start, stop, device, values)
        for start, stop in zip(mode.cuts[:-1], mode.cuts[1:], strict=True)
    ]
    clock = _clock()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        passes = [_pass(layers, dict(values), clock) for _ in range(1 + max(1, repeats))][1:]
    return [
        LayerTime(
            statistics.median(made[index].forward_s for made in passes),
            statistics.median(made[index].backward_s for made in passes),
        )
        for index in range(len(layers))
    ]


def _made_up(node: fx.Node, mode: ModeGraph, num_samples: int, generator: torch.Generator) -> torch.Tensor:
    value = node_value(node)
    shape = shape_at(value, mode, num_samples)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(value.dtype)
    return torch.ones(shape, dtype=value.dtype)


@dataclass(frozen=True)
class _Compiled:
    """A layer as a module, what it takes, what it makes for later layers, and what nobody needs after it."""

    module: nn.Module
    taken: tuple[fx.Node, ...]
    made: tuple[fx.Node, ...]
    done: tuple[fx.Node, ...]


def _pass(
    layers: Sequence[_Compiled], values: dict[fx.Node, Any], clock: Callable[[], float]
) -> list[LayerTime]:
    """One micro-batch forward through all layers, and back."""
    owned = set(values)
    forward_s: list[float] = []
    results: list[Sequence[Any]] = []
    for layer in layers:
        inputs = [values[node] if node in owned else _leaf(values[node]) for node in layer.taken]
        begin_s = clock()
        results.append(layer.module(*inputs))
        forward_s.append(clock() - begin_s)
        for node, result in zip(layer.made, results[-1], strict=True):
            values[node] = result.detach() if isinstance(result, torch.Tensor) else result
        for node in layer.done:
            values.pop(node, None)
    backward_s: list[float] = []
    while results:
        made = results.pop()
        roots = [result for result in made if isinstance(result, torch.Tensor) and result.requires_grad]
        gradients = [torch.ones_like(root) for root in roots]
        begin_s = clock()
        if roots:
            torch.autograd.backward(roots, gradients)
        backward_s.append(clock() - begin_s)
    return [LayerTime(*both) for both in zip(forward_s, reversed(backward_s), strict=True)]


def _compile(
    mode: ModeGraph, start: int, stop: int, device: torch.device, values: dict[fx.Node, Any]
) -> _Compiled:
    nodes = mode.nodes[start:stop]
    inside = set(nodes)
    used = dict.fromkeys(node for call in nodes for node in call.all_input_nodes)
    taken = tuple(node for node in used if node not in inside and node.op != "get_attr")
    made = tuple(node for node in nodes if mode.last_use.get(node, -1) >= stop)
    done = tuple(node for node in taken if node not in values and mode.last_use[node] < stop)
    store = WeightGradients(is_deferred=False)
    sizes = {node: value.numel() for node, value in values.items() if isinstance(value, nn.Parameter)}
    called: dict[str, nn.Module] = {}
    new = fx.Graph()
    built = {node: new.placeholder(node.name) for node in taken}

    def lookup(node: fx.Node) -> fx.Node:
        if node not in built:
            built[node] = new.get_attr(str(node.target))
        return built[node]

    for node in nodes:
        deferred = deferred_module(node, store, sizes, smallest=LARGE_WEIGHT)
        if deferred is None:
            built[node] = copy_node(new, node, lookup, device)
        else:
            called[f"deferred_{node.name}"] = deferred
            args, kwargs = fx.map_arg((node.args, node.kwargs), lookup)
            built[node] = new.call_module(f"deferred_{node.name}", args, kwargs)
    new.output(tuple(built[node] for node in made))
    targets = {str(node.target) for node in new.nodes if node.op in ("get_attr", "call_module")}
    called |= {name: module_on(mode.submodules[name], device) for name in targets - set(called)}
    return _Compiled(fx.GraphModule(called, new), taken, made, done)


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex):
        return value.detach().requires_grad_()
    return value


def _median_s(run: Callable[[], Any], repeats: int) -> float:
    run()
    times, clock = [], _clock()
    for _ in range(max(1, repeats)):
        begin_s = clock()
        run()
        times.append(clock() - begin_s)
    return statistics.median(times)


def _clock() -> Callable[[], float]:
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
