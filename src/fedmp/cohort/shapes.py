"""Batched rules of functions that look at dims: shapes, reductions, cutting and joining, matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fedmp.cohort.elementwise import aligned
from fedmp.cohort.registry import CannotStackError, batched_rule
from fedmp.cohort.stacked import Stacked, _by_vmap, rank

__all__ = ["register"]

_T: Any = torch.Tensor
_REDUCTIONS = """
    sum mean amax amin prod var std logsumexp norm all any argmax argmin max min cumsum cumprod softmax
    log_softmax softmin median count_nonzero nansum nanmean sort argsort topk glu normalize
"""


def register() -> None:
    """Register the rules of this module."""
    _register_attributes()
    _register_reductions()
    _register_reshaping()
    _register_pieces()
    _register_products()


def _dim(dim: Any) -> Any:
    """A client's dim as a physical one; negative dims count from the end and stay."""
    if isinstance(dim, Sequence):
        return [_dim(one) for one in dim]
    return dim + 1 if dim >= 0 else dim


def _both(name: str) -> list[Any]:
    return [func for home in (torch, _T, F) if (func := getattr(home, name, None)) is not None]


def _register_attributes() -> None:
    batched_rule(_T.shape.__get__)(lambda x: torch.Size(x.shape[1:]))
    batched_rule(_T.ndim.__get__, _T.dim, _T.ndimension)(lambda x: x.dim() - 1)
    batched_rule(_T.__len__)(lambda x: x.shape[1])
    batched_rule(_T.numel, torch.numel, _T.nelement)(lambda x: x[0].numel())
    for name in (
        "dtype",
        "device",
        "requires_grad",
        "is_leaf",
        "layout",
        "is_cuda",
        "is_sparse",
        "is_nested",
        "is_quantized",
        "is_mkldnn",
        "is_meta",
        "is_cpu",
        "names",
        "grad_fn",
        "is_mps",
        "is_xpu",
    ):
        if hasattr(_T, name):
            getter = getattr(_T, name).__get__
            batched_rule(getter)(getter)
    for name in ("is_floating_point", "is_complex", "get_device", "is_contiguous", "element_size"):
        for func in _both(name):
            batched_rule(func)(_without_kwargs(func))

    batched_rule(_T.__repr__, _T.__format__)(
        lambda x, *_: f"Stacked({x.shape[0]} clients of {list(x.shape[1:])})"
    )

    @batched_rule(_T.size)
    def size(x: torch.Tensor, dim: int | None = None) -> Any:
        shape = torch.Size(x.shape[1:])
        return shape if dim is None else shape[dim]

    @batched_rule(_T.T.__get__, _T.mT.__get__, _T.t, torch.t)
    def transposed(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 3:
            return x
        if x.dim() > 3:
            raise CannotStackError("x.T of more than two dims")
        return x.transpose(-1, -2)

    @batched_rule(_T.__bool__, _T.item, _T.tolist, _T.numpy, _T.__float__, _T.__int__, _T.__index__)
    def value(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise CannotStackError(
            "the forward reads a tensor's values (a branch, a number) that differ by client"
        )


def _without_kwargs(func: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *_, **__: func(x)


def _register_reductions() -> None:
    for name in _REDUCTIONS.split():
        for func in _both(name):
            batched_rule(func)(_reduction(func, name))


def _reduction(func: Callable[..., Any], name: str) -> Callable[..., Any]:
    full = {"max": torch.amax, "min": torch.amin}
    place = {"norm": 2, "topk": 2, "normalize": 2}.get(name, 1)
    last = {"sort", "argsort", "topk", "glu"}

    def rule(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if name == "normalize" and "dim" not in kwargs and len(given) < place:
            kwargs["dim"] = 1
        if name in ("max", "min") and given and isinstance(given[0], torch.Tensor):
            return (torch.maximum if name == "max" else torch.minimum)(*aligned((x, given[0])))
        if not isinstance(x, Stacked):
            raise CannotStackError(f"{name} of a shared tensor")
        if kwargs.get("dim") is not None:
            kwargs["dim"] = _dim(kwargs["dim"])
        elif len(given) >= place and given[place - 1] is not None and not isinstance(given[place - 1], bool):
            given[place - 1] = _dim(given[place - 1])
        elif name in last:
            pass  # the last dim, of which there is one
        elif name in ("softmax", "log_softmax", "softmin"):
            raise CannotStackError(f"{name} without a dim")
        else:
            flat = x.reshape(x.shape[0], -1)
            whole = full.get(name, func)
            kwargs.pop("dim", None)
            rest = {"dtype": kwargs["dtype"]} if kwargs.get("dtype") else {}
            if name in ("var", "std", "norm"):
                return _by_vmap(func, (x, *args), kwargs)
            return whole(flat, dim=1, **rest)  # type: ignore[no-untyped-call]
        return func(x, *given, **kwargs)

    return rule


def _sizes(sizes: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    found = kwargs.get("size", kwargs.get("shape", sizes))
    if len(found) == 1 and isinstance(found[0], Sequence):
        found = found[0]
    return list(found)


def _register_reshaping() -> None:
    @batched_rule(_T.reshape, torch.reshape, _T.view, _T.view_as, _T.reshape_as)
    def reshape(x: torch.Tensor, *sizes: Any, **kwargs: Any) -> torch.Tensor:
        if sizes and isinstance(sizes[0], torch.Tensor):
            other = sizes[0]
            return x.reshape(x.shape[0], *(other.shape[1:] if isinstance(other, Stacked) else other.shape))
        if sizes and isinstance(sizes[0], torch.dtype):
            raise CannotStackError("view as another dtype")
        return x.reshape(x.shape[0], *_sizes(sizes, kwargs))

    @batched_rule(_T.flatten, torch.flatten)
    def flatten(x: torch.Tensor, start_dim: int = 0, end_dim: int = -1) -> torch.Tensor:
        return x.flatten(_dim(start_dim), _dim(end_dim)) if x.dim() > 1 else x.unsqueeze(1)

    @batched_rule(_T.unflatten, torch.unflatten)
    def unflatten(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        return x.unflatten(_dim(dim), sizes)  # type: ignore[no-any-return]

    @batched_rule(_T.unsqueeze, torch.unsqueeze)
    def unsqueeze(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.unsqueeze(_dim(dim))

    @batched_rule(_T.squeeze, torch.squeeze)
    def squeeze(x: torch.Tensor, dim: Any = None) -> torch.Tensor:
        if dim is None:
            return x.reshape(x.shape[0], *[size for size in x.shape[1:] if size != 1])
        return x.squeeze(_dim(dim))

    for func in (_T.transpose, torch.transpose, _T.swapaxes, torch.swapaxes, _T.movedim, torch.movedim):
        batched_rule(func)(lambda x, a, b, func=func: func(x, _dim(a), _dim(b)))

    @batched_rule(_T.permute, torch.permute)
    def permute(x: torch.Tensor, *dims: Any, **kwargs: Any) -> torch.Tensor:
        order = kwargs.get("dims", dims)
        order = order[0] if len(order) == 1 and isinstance(order[0], Sequence) else order
        return x.permute(0, *(dim % (x.dim() - 1) + 1 for dim in order))

    @batched_rule(_T.expand, _T.expand_as, torch.broadcast_to, _T.broadcast_to)
    def expand(x: torch.Tensor, *sizes: Any, **kwargs: Any) -> torch.Tensor:
        if sizes and isinstance(sizes[0], torch.Tensor):
            wanted = list(sizes[0].shape[1:] if isinstance(sizes[0], Stacked) else sizes[0].shape)
        else:
            wanted = _sizes(sizes, kwargs)
        wide = x.reshape(x.shape[0], *[1] * (len(wanted) - x.dim() + 1), *x.shape[1:])
        return wide.expand(x.shape[0], *wanted)

    @batched_rule(_T.repeat)
    def repeat(x: torch.Tensor, *sizes: Any, **kwargs: Any) -> torch.Tensor:
        times = _sizes(sizes, {"size": kwargs["repeats"]} if "repeats" in kwargs else {})
        wide = x.reshape(x.shape[0], *[1] * (len(times) - x.dim() + 1), *x.shape[1:])
        return wide.repeat(1, *times)

    for name in ("new_zeros", "new_ones", "new_empty"):
        func = getattr(_T, name)
        batched_rule(func)(
            lambda x, *sizes, func=func, **kw: func(
                x, (x.shape[0], *_sizes(sizes, kw)), **{k: v for k, v in kw.items() if k != "size"}
            )
        )


def _register_pieces() -> None:
    for name in ("chunk", "split", "tensor_split", "split_with_sizes"):
        for func in _both(name):

            @batched_rule(func)
            def pieces(x: torch.Tensor, count: Any, dim: int = 0, *, func: Any = func) -> Any:
                return func(x, count, dim=_dim(dim))

    @batched_rule(torch.unbind, _T.unbind)
    def unbind(x: torch.Tensor, dim: int = 0) -> Any:
        return x.unbind(_dim(dim))

    batched_rule(_T.__iter__)(lambda x: iter([piece.as_subclass(Stacked) for piece in x.unbind(1)]))
    for name in ("select", "narrow", "flip", "roll", "index_select", "gather", "diff"):
        for func in _both(name):
            batched_rule(func)(_with_dim_first(func, name))
    for name in ("tril", "triu"):
        for func in _both(name):
            batched_rule(func)(func)

    @batched_rule(torch.cat, torch.concat, torch.concatenate)
    def cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        return torch.cat(_all_stacked(tensors), _dim(dim))

    @batched_rule(torch.stack)
    def stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        return torch.stack(_all_stacked(tensors), _dim(dim))

    @batched_rule(_T.__getitem__)
    def getitem(x: torch.Tensor, index: Any) -> torch.Tensor:
        if not isinstance(x, Stacked):
            return _by_vmap(_T.__getitem__, (x, index), {})  # type: ignore[no-any-return]
        return x[_index(x, index)]

    @batched_rule(_T.__setitem__)
    def setitem(x: torch.Tensor, index: Any, value: Any) -> None:
        if not isinstance(x, Stacked):
            raise CannotStackError("a tensor that all clients share is changed in place")
        where = x[_index(x, index)]
        if isinstance(value, Stacked):
            missing = where.dim() - value.dim()
            value = value.reshape(value.shape[0], *[1] * missing, *value.shape[1:])
        x[_index(x, index)] = value


def _with_dim_first(func: Callable[..., Any], name: str) -> Callable[..., Any]:
    def rule(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        place = {"roll": 1, "diff": 1}.get(name, 0)
        key = "dims" if name in ("flip", "roll") else "dim"
        if name in ("index_select", "gather") and any(
            isinstance(a, Stacked) for a in (*args, *kwargs.values())
        ):
            return _by_vmap(func, (x, *args), kwargs)
        if name == "flip" and len(args) > 1:
            args = (list(args),)
        if not isinstance(x, Stacked) or (key not in kwargs and len(args) <= place):
            return _by_vmap(func, (x, *args), kwargs)
        if key in kwargs:
            return func(x, *args, **{**kwargs, key: _dim(kwargs[key])})
        return func(x, *args[:place], _dim(args[place]), *args[place + 1 :], **kwargs)

    return rule


def _all_stacked(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    clients = next(tensor.shape[0] for tensor in tensors if isinstance(tensor, Stacked))
    return [
        tensor if isinstance(tensor, Stacked) else tensor.unsqueeze(0).expand(clients, *tensor.shape)
        for tensor in tensors
    ]


def _index(x: torch.Tensor, index: Any) -> tuple[Any, ...]:
    parts = index if isinstance(index, tuple) else (index,)
    tensors = [part for part in parts if isinstance(part, torch.Tensor | list)]
    if len(tensors) > 1 or any(isinstance(part, Stacked) for part in tensors):
        raise CannotStackError("an index made of several tensors, or one that differs by client")
    return (slice(None), *parts)


def _register_products() -> None:
    @batched_rule(torch.matmul, _T.matmul, _T.__matmul__, torch.bmm, _T.bmm, torch.mm, _T.mm)
    def matmul(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if rank(first) < 2 or rank(second) < 2:
            return _by_vmap(torch.matmul, (first, second), {})  # type: ignore[no-any-return]
        return torch.matmul(*aligned((first, second)))

    @batched_rule(_T.__rmatmul__)
    def rmatmul(second: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        return matmul(first, second)  # type: ignore[no-any-return]

    @batched_rule(torch.einsum)
    def einsum(equation: str, *operands: Any) -> torch.Tensor:
        tensors = (
            list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
        )
        unused = next(letter for letter in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if letter not in equation)
        if "->" not in equation:
            return _by_vmap(torch.einsum, (equation, *tensors), {})  # type: ignore[no-any-return]
        inputs, output = equation.replace(" ", "").split("->")
        marked = [
            unused + part if isinstance(tensor, Stacked) else part
            for part, tensor in zip(inputs.split(","), tensors, strict=True)
        ]
        return torch.einsum(f"{','.join(marked)}->{unused}{output}", *tensors)
