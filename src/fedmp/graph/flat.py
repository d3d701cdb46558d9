"""A model's arguments and result as flat lists of tensors, with the trees around them kept aside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fedmp.errors import TraceError
from fedmp.graph.portable import to_plain

__all__ = ["FlatForward", "FlatInputs", "flatten_inputs"]


@dataclass(frozen=True)
class FlatInputs:
    """A model's arguments, flattened.

    Attributes:
        tensors: the tensor arguments, in order.
        constants: the other ones by flattened position.
        spec: how (args, kwargs) flatten.
        batch_size: first dim of the first tensor.
    """

    tensors: tuple[torch.Tensor, ...]
    constants: Mapping[int, Any]
    spec: TreeSpec
    batch_size: int

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """(args, kwargs) with other tensors."""
        return _fill(self.spec, self.constants, tensors)


def flatten_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FlatInputs:
    """Take the example inputs apart.

    Raises:
        TraceError: no tensor among them has a batch dim.
    """
    leaves, spec = tree_flatten(to_plain((args, dict(kwargs))))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    first = next((tensor for tensor in tensors if tensor.dim() > 0), None)
    if first is None or first.shape[0] == 0:
        raise TraceError(
            f"tracing {type(model).__name__} needs at least one example tensor with a batch dim and one "
            f"sample, not {[tuple(tensor.shape) for tensor in tensors]}"
        )
    constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
    return FlatInputs(tensors, constants, spec, int(first.shape[0]))


class FlatForward:
    """A forward from flat tensors to flat tensors, which remembers the trees."""

    def __init__(self, model: nn.Module, inputs: FlatInputs) -> None:
        self._model = model
        self._inputs = inputs
        self._forward: Callable[..., Any] = model.forward
        self.out_spec: TreeSpec | None = None
        self.out_constants: dict[int, Any] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Use it in place of the model's own forward."""
        own = self._model.__dict__.get("forward")

        def forward(*tensors: Any) -> Any:
            return self(*tensors)

        self._model.forward = forward
        try:
            yield
        finally:
            del self._model.forward
            if own is not None:
                self._model.forward = own

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        args, kwargs = self._inputs.rebuild(tensors)
        leaves, self.out_spec = tree_flatten(to_plain(self._forward(*args, **kwargs)))
        moving = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
        self.out_constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, moving)}
        return tuple(leaf for leaf in leaves if isinstance(leaf, moving))


def _fill(spec: TreeSpec, constants: Mapping[int, Any], tensors: Sequence[Any]) -> Any:
    rest = iter(tensors)
    return tree_unflatten(
        [constants[index] if index in constants else next(rest) for index in range(spec.num_leaves)], spec
    )
