"""Find out what a leaf returns, and what it costs, by running a copy of it on made-up inputs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from fedmp.errors import TraceError
from fedmp.graph.leaf_call import CallArguments, LeafCall

__all__ = ["TENSOR", "Probe", "probe_call"]

TENSOR = object()


@dataclass(frozen=True)
class _Run:
    """What a call of a leaf returned for made-up inputs, and what it cost."""

    spec: TreeSpec
    leaves: list[Any]
    flops: float
    saved_bytes: float


@dataclass(frozen=True)
class Probe:
    """What a leaf returns: its tree, its leaves with `TENSOR` for tensors, and those tensors' shapes."""

    spec: TreeSpec
    leaves: list[Any]
    results: list[Any]


def probe_call(name: str, original: nn.Module, call: LeafCall, arguments: CallArguments) -> Probe:
    """Run a copy of the leaf at two batch sizes.

    Raises:
        TraceError: it returns another structure for another batch size, or fails.
    """
    tensors = arguments.tensors
    sizes = [size for tensor in tensors for size in tensor.shape if isinstance(size, torch.SymInt)]
    base = min(sizes, key=lambda size: _scaled([size], 1)[0], default=None)
    hint = 1 if base is None else _scaled([base], 1)[0]
    once, twice = (_run_aside(name, original, call, arguments, scale) for scale in (1, 2))
    if once.spec != twice.spec:
        raise TraceError(
            f"{name} returns another structure for another batch size: {once.spec}, {twice.spec}"
        )
    call.flops = (twice.flops - once.flops) / hint
    call.saved_bytes = (twice.saved_bytes - once.saved_bytes) / hint

    def size_of(first: int, second: int) -> Any:
        if first == second or base is None:
            return first
        slope, rest = divmod(second - first, hint)
        return (base * (second - first) // hint if rest else base * slope) + (2 * first - second)

    leaves: list[Any] = []
    results: list[Any] = []
    for first, second in zip(once.leaves, twice.leaves, strict=True):
        if isinstance(first, torch.Tensor):
            shape = [size_of(*pair) for pair in zip(first.shape, second.shape, strict=True)]
            results.append((shape, first.dtype, tensors[0].device if tensors else first.device))
            leaves.append(TENSOR)
        else:
            leaves.append(size_of(first, second) if type(first) is int else first)
    return Probe(once.spec, leaves, results)


def _run_aside(name: str, original: nn.Module, call: LeafCall, arguments: CallArguments, scale: int) -> _Run:
    """Run in a thread of its own, where none of the export's modes is active."""
    outcome: list[_Run | Exception] = []
    device = next((tensor.device for tensor in (*original.parameters(), *original.buffers())), None)
    inputs = [
        (_scaled(tensor.shape, scale), tensor.dtype, device or tensor.device) for tensor in arguments.tensors
    ]
    numbers = _scaled(arguments.numbers, scale)

    def run() -> None:
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            return tensor

        try:
            with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
                module = copy.deepcopy(original)
                made = [_made_up(*each) for each in inputs]
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    leaves, spec = tree_flatten(call.run(module, {}, made, numbers))
                outcome.append(_Run(spec, leaves, counter.get_total_flops(), sum(saved.values())))
        except Exception as error:  # whatever the user's module raises
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        shapes = [tuple(shape) for shape, _, _ in inputs]
        raise TraceError(
            f"{name} fails on example inputs of shapes {shapes}: {type(outcome[0]).__name__}: {outcome[0]}"
        ) from outcome[0]
    return outcome[0]


def _made_up(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        real = torch.randn(shape, device=device)
        return real.to(dtype)
    return torch.ones(shape, dtype=dtype, device=device)


def _scaled(sizes: Sequence[Any], scale: int) -> list[int]:
    """Sizes when every symbol is `scale` times its example value."""
    return [_evaluate(size, scale) if isinstance(size, torch.SymInt) else int(size) for size in sizes]


def _evaluate(size: torch.SymInt, scale: int) -> int:
    values = size.node.shape_env.backed_var_to_val
    expression = size.node.expr
    return int(expression.xreplace({symbol: values[symbol] * scale for symbol in expression.free_symbols}))
