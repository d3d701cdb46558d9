"""Find out cheaply whether a model computes the same in train and in eval mode, to export it only once.

The forward is run in both modes on fake tensors, and the calls that reach the dispatcher are compared:
operators, numbers, which tensors they take, and whether gradients are recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fedmp.graph.flat import FlatInputs
from fedmp.graph.portable import to_plain
from fedmp.graph.swap import swapped

__all__ = ["is_same_in_both_modes"]

_DIFFERENT = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RNNBase)


def is_same_in_both_modes(model: nn.Module, inputs: FlatInputs) -> bool:
    """Whether train and eval mode run the same calls.

    Args:
        model: left in the mode of the last run; the caller restores it.
        inputs: example inputs.

    Returns:
        False also if it cannot be told.
    """
    if any(isinstance(module, _DIFFERENT) and getattr(module, "p", 1.0) for module in model.modules()):
        return False
    try:
        model.train()
        first = _calls(model, inputs)
        model.eval()
        return bool(first == _calls(model, inputs))
    except Exception:  # whatever stops a run on fake tensors, the export will explain
        return False


class _Recorder(TorchDispatchMode):
    """Notes down every call; a tensor is named by the call that made it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Any] = []
        self._names: dict[int, tuple[int, int]] = {}
        self._alive: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves, spec = tree_flatten((args, kwargs or {}))
        self.calls.append((func, torch.is_grad_enabled(), spec, [self.name(leaf) for leaf in leaves]))
        for place, leaf in enumerate(tree_flatten(result)[0]):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in self._names:
                self._names[id(leaf)] = (len(self.calls), place)
                self._alive.append(leaf)
        return result

    def name(self, leaf: Any) -> Any:
        """A tensor's name; anything else stands for itself."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in self._names:
            self._names[id(leaf)] = (-1, len(self._names))
            self._alive.append(leaf)
        return self._names[id(leaf)]


def _calls(model: nn.Module, inputs: FlatInputs) -> Any:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    own: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    recorder = _Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        state = {name: fake.from_tensor(tensor) for name, tensor in own.items()}
        tensors = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in inputs.tensors]
        args, kwargs = inputs.rebuild(tensors)
        for tensor in (*state.values(), *tensors):
            recorder.name(tensor)
        with recorder, swapped(model, state):
            result = model(*args, **kwargs)
        leaves, spec = tree_flatten(to_plain(result))
    return recorder.calls, [recorder.name(leaf) for leaf in leaves], spec, tree_map(type, leaves)
