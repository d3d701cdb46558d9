"""Batched rules of losses: each client has a loss of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fedmp.cohort.elementwise import aligned
from fedmp.cohort.registry import batched_rule
from fedmp.cohort.stacked import Stacked, _by_vmap

__all__ = ["register"]


def register() -> None:
    """Register the rules of this module."""
    batched_rule(F.cross_entropy)(_of_classes(F.cross_entropy))
    batched_rule(F.nll_loss)(_of_classes(F.nll_loss))
    for func in (
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy_with_logits,
        F.binary_cross_entropy,
    ):
        batched_rule(func)(_of_entries(func))


def _of_classes(func: Callable[..., Any]) -> Callable[..., Any]:
    def rule(
        x: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        **kwargs: Any,
    ) -> torch.Tensor:
        is_usual = isinstance(x, Stacked) and isinstance(target, Stacked) and x.dim() > 2
        if not is_usual or weight is not None or target.is_floating_point() or size_average is not None:
            given = dict(weight=weight, ignore_index=ignore_index, reduction=reduction, **kwargs)
            return _by_vmap(func, (x, target), given)  # type: ignore[no-any-return]
        clients = x.shape[0]
        terms = func(
            x.flatten(0, 1), target.flatten(0, 1), ignore_index=ignore_index, reduction="none", **kwargs
        )
        if reduction == "none":
            return terms.unflatten(0, (clients, -1))  # type: ignore[no-any-return]
        sums = terms.view(clients, -1).sum(1)
        if reduction == "sum":
            return sums  # type: ignore[no-any-return]
        return sums / (target != ignore_index).flatten(1).sum(1)  # type: ignore[no-any-return]

    return rule


def _of_entries(func: Callable[..., Any]) -> Callable[..., Any]:
    def rule(
        x: torch.Tensor, target: torch.Tensor, *args: Any, reduction: str = "mean", **kwargs: Any
    ) -> Any:
        if args or any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            return _by_vmap(func, (x, target, *args), {"reduction": reduction, **kwargs})
        first, second = aligned((x, target))
        terms = func(*torch.broadcast_tensors(first, second), reduction="none", **kwargs)
        if reduction == "none":
            return terms
        flat = terms.flatten(1)
        return flat.sum(1) if reduction == "sum" else flat.mean(1)

    return rule
