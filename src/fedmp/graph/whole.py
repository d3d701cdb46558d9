"""What a whole model costs, counted while its own forward runs once: for plans of a single stage, which need no trace.

Each operation that reaches a kernel is charged as a call of a traced graph is (`fedmp.graph.estimate`). Where one call
of the graph is several kernels (dropout, say), the bytes between them are charged as well, so an estimate may be a
little higher than the trace's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fedmp.graph.estimate import FLOP_FORMULAS, FLOPS_PER_BYTE, moves_nothing
from fedmp.graph.profile import REFERENCE_FLOPS_PER_S, estimated_profile
from fedmp.graph.specs import state_specs
from fedmp.records import LayerProfile, Profile

__all__ = ["forward_flops", "profile_whole"]


def forward_flops(model: nn.Module, inputs: torch.Tensor) -> float:
    """What a model's forward costs: floating-point operations, and for what hardly computes the bytes that it moves.

    Args:
        model: with its weights in memory; it is not changed.
        inputs: a batch of its inputs, of any values.
    """
    counter = _Counter(set())
    with torch.no_grad(), counter:
        copy.deepcopy(model).eval()(inputs)
    return counter.flops


def profile_whole(model: nn.Module, inputs: torch.Tensor, *, optimizer_copies: float = 1.0) -> Profile:
    """Profile a model as a single layer, for a device of 100 GFLOP/s.

    Args:
        model: with its weights in memory; it is not changed.
        inputs: a batch of its inputs, of any values.
        optimizer_copies: optimizer state in units of the parameters' size (SGD 0, with momentum 1, Adam 2).

    Returns:
        The costs for one sample, as `profile` tells them of a traced model.
    """
    alone = copy.deepcopy(model).train()  # a forward may move statistics
    specs, batch_size = state_specs(model), len(inputs)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*alone.parameters(), *alone.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.random.fork_rng(devices=[]),
        _Counter(own) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.enable_grad(),
    ):
        output = alone(inputs)
    # a loss keeps about as much as it is given
    kept_bytes = sum(saved.values()) + sum(map(_num_bytes, tree_leaves(output)))
    layer = LayerProfile(
        name=type(model).__name__,
        forward_s=counter.flops / REFERENCE_FLOPS_PER_S / batch_size,
        backward_s=2 * counter.flops / REFERENCE_FLOPS_PER_S / batch_size,
        parameters=tuple(spec.name for spec in specs.values() if spec.kind == "parameter"),
        buffer_bytes=sum(spec.num_bytes for spec in specs.values() if spec.kind != "parameter"),
        activation_bytes=kept_bytes / batch_size,
        workspace_bytes=counter.most_bytes / batch_size,
    )
    return estimated_profile((layer,), specs, batch_size=batch_size, optimizer_copies=optimizer_copies)


class _Counter(TorchDispatchMode):
    """Charges every operation for its floating-point operations or the bytes it moves, whichever is more.

    Args:
        own: where the model's own tensors are.

    Attributes:
        flops: so far.
        most_bytes: that an operation took and made, without the model's own tensors: about what its backward
            holds for a moment.
    """

    def __init__(self, own: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = own
        self.flops = 0.0
        self.most_bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and to be skipped would import torch's compiler, which takes 2 s."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and charge it."""
        result = func(*args, **(kwargs or {}))
        if moves_nothing(func, (args, kwargs), result):
            return result
        leaves = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        formula = FLOP_FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        counted = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        self.flops += max(counted, FLOPS_PER_BYTE * sum(map(_num_bytes, leaves)))
        passing = [leaf for leaf in leaves if leaf.untyped_storage().data_ptr() not in self._own]
        copies = 3 if "conv" in str(func) else 1  # a convolution copies its input and its result as well
        self.most_bytes = max(self.most_bytes, copies * sum(map(_num_bytes, passing)))
        return result


def _num_bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, torch.Tensor) else 0
