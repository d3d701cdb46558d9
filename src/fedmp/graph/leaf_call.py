"""A call of a module or an autograd function that was not traced into, as a node can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fedmp.graph.portable import to_plain
from fedmp.graph.swap import swapped

__all__ = ["CallArguments", "FunctionBody", "LeafCall", "ModuleBody"]


@dataclass(frozen=True)
class CallArguments:
    """The arguments of a call, flattened: tensors, sizes that depend on the batch, and the rest."""

    spec: TreeSpec
    tensors: list[torch.Tensor]
    numbers: list[Any]
    number_places: tuple[int, ...]
    constants: dict[int, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallArguments:
        """Those of a call under way; sizes that depend on the batch are symbolic."""
        leaves, spec = tree_flatten(to_plain((args, dict(kwargs))))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.SymInt))
        rest = {
            i: leaf for i, leaf in enumerate(leaves) if i not in places and not isinstance(leaf, torch.Tensor)
        }
        return cls(spec, tensors, [leaves[i] for i in places], places, rest)


class LeafCall(nn.Module):
    """One call of a leaf: `call(state, tensors, numbers)` returns a list of tensors.

    Attributes:
        num_parameters: how many of the tensors in `state`, counted from the first, are parameters; the
            rest are buffers.
        flops, saved_bytes: measured on a copy, for one sample.
    """

    def __init__(
        self, body: nn.Module, names: tuple[str, ...], num_parameters: int, arguments: CallArguments
    ) -> None:
        super().__init__()
        self.body = body
        self.training = body.training
        self.num_parameters = num_parameters
        self.flops = 0.0
        self.saved_bytes = 0.0
        self._names = names
        self._spec = arguments.spec
        self._constants = arguments.constants
        self._number_places = arguments.number_places

    def forward(
        self, state: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], numbers: Sequence[int]
    ) -> list[torch.Tensor]:
        """Run the original code on other tensors."""
        result = self.run(self.body, dict(zip(self._names, state, strict=True)), tensors, numbers)
        # later views were traced for contiguous results
        return [leaf.contiguous() for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]

    def buffers_among(self, state: Any) -> list[Any]:
        """Of the nodes of its state, those of buffers."""
        return list(state)[self.num_parameters :]

    def run(
        self,
        body: nn.Module,
        state: Mapping[str, torch.Tensor],
        tensors: Sequence[torch.Tensor],
        numbers: Sequence[int],
    ) -> Any:
        """The result of `body` as a plain tree."""
        known = {**self._constants, **dict(zip(self._number_places, numbers, strict=True))}
        rest = iter(tensors)
        leaves = [known[i] if i in known else next(rest) for i in range(self._spec.num_leaves)]
        args, kwargs = tree_unflatten(leaves, self._spec)
        with swapped(body, state):
            return to_plain(body(*args, **kwargs))


class ModuleBody(nn.Module):
    """Calls the forward alone: hooks run where the leaf is called, and are traced there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


class FunctionBody(nn.Module):
    """Calls a custom autograd function."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)
