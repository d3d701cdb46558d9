"""What each call of a graph would cost, found by running it on fake tensors: nothing is computed.

A call takes as long as its floating-point operations, or as the bytes it moves on a device that moves one
byte in the time of `FLOPS_PER_BYTE` operations, whichever is more. What it keeps for backward is what
autograd saves, each storage counted once, where it is first saved. What its backward needs for a moment is
the gradients that are alive then: those of all tensors that are made before it, or by it, and used by it or
after it, since a backward runs through the graph the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fedmp.graph.batch import in_batch, size_at
from fedmp.graph.devices import module_on, on_device
from fedmp.graph.layer_graph import ModeGraph, StateSpec, node_value
from fedmp.graph.leaf_call import LeafCall

__all__ = ["FLOPS_PER_BYTE", "FLOP_FORMULAS", "CallCost", "estimate_calls", "moves_nothing", "shape_at"]

FLOPS_PER_BYTE = 8.0
_CPU = torch.device("cpu")


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Of the products of queries [.., T, E] with keys [.., S, E], and with values [.., S, V]; a mask saves nothing."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_attention_flops._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode then gives tensors, not shapes

# torch counts the attention of every backend but the CPU's
FLOP_FORMULAS: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}


@dataclass
class CallCost:
    """What one call costs for the whole example batch.

    Attributes:
        flops: operations, or bytes moved times `FLOPS_PER_BYTE` where that is more.
        saved_bytes: memory that it is the first to keep for backward.
        transient_bytes: what its backward holds for a moment beside what was saved: all gradients that are
            alive then, and the copies that a convolution makes.
        saves: of what calls before it made, the results that it is the first to keep, by call, in bytes.
    """

    flops: float = 0.0
    saved_bytes: float = 0.0
    transient_bytes: float = 0.0
    saves: dict[fx.Node, float] = field(default_factory=dict)


def estimate_calls(mode: ModeGraph, state: Mapping[str, StateSpec], num_samples: int) -> list[CallCost]:
    """Run a graph on fake tensors, charging each call.

    Args:
        mode: the graph.
        state: the model's tensors by name.
        num_samples: batch size to run with.

    Returns:
        One cost for each of the graph's nodes.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        return _run(mode, state, num_samples)


def moves_nothing(operation: Any, given: Any, result: Any) -> bool:
    """Whether all tensors that an operation returns are, or are views of, what it was given, as it was.

    Such are views, the items of a tuple, and a dropout at rate zero.
    """
    if isinstance(operation, torch._ops.OpOverload) and operation._schema.is_mutable:
        return False
    had = {leaf.untyped_storage() for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)}
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return all(leaf.untyped_storage() in had for leaf in made)


def shape_at(value: torch.Tensor, mode: ModeGraph, num_samples: int) -> list[int]:
    """The shape of a symbolic tensor for a number of samples; 1 for sizes that data decide."""
    return [size if isinstance(size, int) else _size(size, mode, num_samples) for size in value.shape]


def _size(size: Any, mode: ModeGraph, num_samples: int) -> int:
    expression = in_batch(size.node.expr, mode.sizes)
    unknown = expression.free_symbols - {
        symbol for known in mode.sizes.values() for symbol in known.free_symbols
    }
    return size_at(expression.xreplace(dict.fromkeys(unknown, 1)), num_samples)


def _run(mode: ModeGraph, state: Mapping[str, StateSpec], num_samples: int) -> list[CallCost]:
    values: dict[fx.Node, Any] = {node: _owned(state[name]) for node, name in mode.state.items()}
    known = {tensor.untyped_storage() for tensor in values.values()}
    makers: dict[Any, fx.Node] = {}
    for node in mode.inputs:
        if node is not None:
            values[node] = _example(node_value(node), mode, num_samples)
            makers[values[node].untyped_storage()] = node
    bodies = {name: module_on(module, _CPU) for name, module in mode.submodules.items()}
    cost = CallCost()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in known:
            known.add(storage)
            cost.saved_bytes += storage.nbytes()
            if storage in makers:
                cost.saves[makers[storage]] = storage.nbytes()
        return tensor

    costs: list[CallCost] = []
    gradients = _Gradients(mode)
    flops_before = 0
    counter = FlopCounterMode(display=False, custom_mapping=dict(FLOP_FORMULAS))
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, _same):
        for index, node in enumerate(mode.nodes):
            cost = CallCost()
            args, kwargs = _arguments(node, bodies, values)
            body = bodies.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(body, LeafCall):
                values[node] = [
                    _example(value, mode, num_samples, is_made=True) for value in node_value(node)
                ]
                cost = CallCost(body.flops * num_samples, body.saved_bytes * num_samples)
            else:
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
            moved = sum(_tensor_bytes(leaf) for leaf in tree_leaves((args, kwargs, values[node])))
            is_free = moves_nothing(node.target, (args, kwargs), values[node])
            counted = counter.get_total_flops() - flops_before
            flops_before = counter.get_total_flops()
            cost.flops = max(cost.flops, counted, 0.0 if is_free else FLOPS_PER_BYTE * moved)
            for leaf in tree_leaves(values[node]):
                if isinstance(leaf, torch.Tensor):
                    makers.setdefault(leaf.untyped_storage(), node)
            given = [
                values[used] for used in node.all_input_nodes if used in values and used not in mode.state
            ]
            cost.transient_bytes = gradients.alive_at(index, values[node])
            if "conv" in str(node.target):
                # input and result, or their gradients, are copied into the order that the kernel wants
                cost.transient_bytes += 2 * max(map(_tensor_bytes, tree_leaves((given, values[node]))))
            costs.append(cost)
            for used in node.all_input_nodes:
                if mode.last_use.get(used) == index:
                    values.pop(used, None)
    return costs


class _Gradients:
    """Which gradients are alive when the backward reaches a call, if asked call by call."""

    def __init__(self, mode: ModeGraph) -> None:
        self._mode = mode
        self._users: dict[Any, int] = {}
        self._ends: dict[int, list[Any]] = {}
        self._num_bytes = 0

    def alive_at(self, index: int, result: Any) -> int:
        """Bytes at a call that makes `result`. A view of all of a tensor has its gradient in common."""
        last_use = self._mode.last_use.get(self._mode.nodes[index], index)
        for leaf in tree_leaves(result):
            if _real_bytes(leaf) and leaf.requires_grad:
                key = leaf.untyped_storage(), leaf.numel()
                if key not in self._users:
                    self._num_bytes += _real_bytes(leaf)
                self._users[key] = self._users.get(key, 0) + 1
                self._ends.setdefault(last_use, []).append((key, _real_bytes(leaf)))
        alive = self._num_bytes
        for key, num_bytes in self._ends.pop(index, []):
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._num_bytes -= num_bytes
        return alive


def _owned(spec: StateSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, requires_grad=spec.requires_grad)


def _example(
    value: torch.Tensor, mode: ModeGraph, num_samples: int, *, is_made: bool = False
) -> torch.Tensor:
    is_real = value.dtype.is_floating_point or value.dtype.is_complex
    shape = shape_at(value, mode, num_samples)
    return torch.empty(shape, dtype=value.dtype, requires_grad=is_made and is_real)


def _arguments(
    node: fx.Node, bodies: Mapping[str, Any], values: Mapping[fx.Node, Any]
) -> tuple[Any, dict[str, Any]]:
    def value_of(used: fx.Node) -> Any:
        return bodies[str(used.target)] if used.op == "get_attr" else values[used]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    return on_device(args, _CPU), on_device(kwargs, _CPU)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _real_bytes(leaf: Any) -> int:
    return _tensor_bytes(leaf) if isinstance(leaf, torch.Tensor) and leaf.dtype.is_floating_point else 0


def _tensor_bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.dtype.itemsize if isinstance(leaf, torch.Tensor) else 0
