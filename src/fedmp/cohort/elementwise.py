"""Batched rules of functions that work on each entry by itself: clients are one more dim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fedmp.cohort.registry import CannotStackError, batched_rule
from fedmp.cohort.stacked import Stacked, rank

__all__ = ["aligned", "register"]

_NAMES = """
    abs absolute add addcdiv addcmul and atan atan2 bitwise_and bitwise_not bitwise_or bitwise_xor ceil
    celu clamp clamp_max clamp_min clip clone copysign cos cosh deg2rad detach div divide elu eq erf
    erfc exp exp2 expm1 fill_ floor floor_divide fmod frac ge gelu gt hardshrink hardsigmoid hardswish
    hardtanh heaviside isfinite isinf isnan ldexp le leaky_relu lerp log log10 log1p log2 logaddexp
    logical_and logical_not logical_or logical_xor logit logsigmoid lt masked_fill maximum minimum mish
    mul multiply nan_to_num ne neg negative not_equal pow positive reciprocal relu relu6 remainder round
    rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square sub
    subtract tan tanh tanhshrink threshold threshold_ true_divide trunc where xlogy zero_ zeros_like
    ones_like full_like rand_like randn_like empty_like requires_grad_ dropout alpha_dropout float
    double half bfloat16 int long bool type_as to cpu type __add__ __radd__ __iadd__ __sub__ __rsub__
    __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__
    __floordiv__ __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __ipow__ __neg__ __abs__ __invert__
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __xor__ __rand__ __ror__ __rxor__ __iand__
    __ior__
"""


def aligned(args: tuple[Any, ...]) -> list[Any]:
    """Arguments whose clients' dims line up: dims of size 1 between the clients and the rest."""
    most = max(map(rank, args), default=0)
    return [_widened(arg, most) if isinstance(arg, Stacked) else arg for arg in args]


def register() -> None:
    """Register the rules of this module."""
    for name in _NAMES.split():
        for variant in (name, f"{name}_"):
            for home in (torch, torch.Tensor, F, torch.special):
                func = getattr(home, variant, None)
                if func is not None and not isinstance(func, type):
                    batched_rule(func)(_rule(func))
    batched_rule(torch.Tensor.contiguous)(lambda x, **_: x.contiguous())
    tensor: Any = torch.Tensor
    for attribute in (tensor.grad, tensor.data):
        batched_rule(attribute.__get__)(attribute.__get__)


def _rule(func: Callable[..., Any]) -> Callable[..., Any]:
    changes_first = getattr(func, "__name__", "").endswith("_") or getattr(func, "__name__", "").startswith(
        "__i"
    )

    def rule(*args: Any, **kwargs: Any) -> Any:
        if changes_first and args and not isinstance(args[0], Stacked):
            raise CannotStackError("a tensor that all clients share is changed in place")
        kwargs.pop("memory_format", None)
        if any(isinstance(value, Stacked) for value in kwargs.values()):
            names = list(kwargs)
            lined_up = aligned((*args, *kwargs.values()))
            kwargs = dict(zip(names, lined_up[len(args) :], strict=True))
            return func(*lined_up[: len(args)], **kwargs)
        return func(*aligned(args), **kwargs)

    return rule


def _widened(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    missing = dims - (tensor.dim() - 1)
    return tensor.reshape(tensor.shape[0], *[1] * missing, *tensor.shape[1:]) if missing > 0 else tensor
