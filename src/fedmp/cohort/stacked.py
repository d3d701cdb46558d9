"""A tensor that stands for one tensor of each client: a module's own forward runs once for many clients.

A `Stacked` holds the clients' tensors in dim 0, but shows the shape that one client's tensor has. Every
torch function that is given one looks for a batched rule (`fedmp.cohort.registry`); where there is none,
`torch.vmap` runs that single function. So a user's module, which knows nothing of cohorts, computes the
whole cohort, and autograd runs through it as usual.

Shape letters: K clients; a *physical* shape is [K, *shape], a *logical* one is what a client sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fedmp.cohort.registry import CannotStackError, rule_of
from fedmp.cohort.slot import Slot

__all__ = ["Stacked", "leaf_of", "rank", "stack", "unstack"]


_TENSOR = object()


class Stacked(torch.Tensor):
    """The clients' tensors in dim 0; functions see one client's shape. Made by `stack`.

    Attributes:
        slot: where the gradient of a trained parameter goes; None for any other tensor.
    """

    slot: Slot | None = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function for all clients at once."""
        _count_uses(args)
        if kwargs:
            _count_uses(kwargs.values())
        rule = rule_of(func)
        with torch._C.DisableTorchFunctionSubclass():
            if rule is not None:
                return _wrap(rule(*args, **(kwargs or {})))
            return _wrap(_by_vmap(func, args, kwargs or {}))


def stack(physical: torch.Tensor) -> Stacked:
    """Take dim 0 of a tensor for the clients."""
    with torch._C.DisableTorchFunctionSubclass():
        return physical.as_subclass(Stacked)


def leaf_of(view: torch.Tensor) -> Stacked:
    """A stacked leaf of autograd in the memory of `view`, which may be changed in place between steps.

    It is a tensor of its own and no view to autograd, which would retrace a view through its base after
    every change of that; nor does autograd know of changes that are made during a backward.
    """
    return torch.Tensor._make_subclass(Stacked, view.data, True)


def unstack(tensor: torch.Tensor) -> torch.Tensor:
    """The physical tensor, [K, ...]."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def rank(value: Any) -> int:
    """Dims of one client's tensor; 0 for a number. To be called inside a rule."""
    if isinstance(value, Stacked):
        return value.dim() - 1
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _count_uses(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, Stacked):
            if value.slot is not None:
                value.slot.num_uses += 1
        elif isinstance(value, list | tuple):
            _count_uses(value)


def _wrap(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result if isinstance(result, Stacked) else result.as_subclass(Stacked)
    if isinstance(result, torch.Size) or not isinstance(result, tuple | list):
        return result
    wrapped = [_wrap(item) for item in result]
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return type(result)(*wrapped)
    return type(result)(wrapped)  # also torch.return_types


def _by_vmap(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One function without a rule, by torch.vmap over the stacked ones among its arguments."""
    from torch.utils._pytree import tree_flatten, tree_unflatten

    leaves, spec = tree_flatten((args, dict(kwargs)))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Stacked)]
    plain: list[Any] = []  # the result, with a mark in place of each tensor

    def one(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        own, named = tree_unflatten(filled, spec)
        found, shape = tree_flatten(func(*own, **named))
        plain[:] = [[_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in found], shape]
        return tuple(leaf for leaf in found if isinstance(leaf, torch.Tensor))

    physical = [leaves[place].as_subclass(torch.Tensor) for place in places]
    name = getattr(func, "__name__", str(func))
    try:
        tensors = iter(torch.vmap(one, randomness="different")(*physical))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        raise CannotStackError(f"{name} cannot run for many clients at once: {text[:200]}") from error
    rest, shape = plain
    return tree_unflatten([next(tensors) if leaf is _TENSOR else leaf for leaf in rest], shape)
