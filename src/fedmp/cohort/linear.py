"""A linear layer of many clients, whose backward writes the weights' gradient where the optimizer wants it.

Shape letters: K clients, N rows, I and O features in and out.
"""

from __future__ import annotations

from typing import Any

import torch

from fedmp.cohort.slot import Slot

__all__ = ["batched_linear"]


def batched_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[K, N, I] by [K, O, I], plus [K, O], to [K, N, O]."""
    slots = (getattr(weight, "slot", None), getattr(bias, "slot", None))
    result: torch.Tensor = _Linear.apply(x, weight, bias, *slots)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_slot: Slot | None,
        bias_slot: Slot | None,
    ) -> torch.Tensor:
        x, weight = x.as_subclass(torch.Tensor), weight.as_subclass(torch.Tensor)
        ctx.slots = weight_slot, bias_slot
        common = weight_slot.common if weight_slot is not None else None
        ctx.save_for_backward(x, weight if common is None else common)
        own = None if bias is None else bias.as_subclass(torch.Tensor)
        if common is None:
            return torch.bmm(x, weight.mT) if own is None else torch.baddbmm(own.unsqueeze(1), x, weight.mT)
        common_bias = bias_slot.common if bias_slot is not None else None
        if common_bias is not None:
            return _rows(torch.addmm(common_bias, x.flatten(0, 1), common.t()), x)
        out = _rows(torch.mm(x.flatten(0, 1), common.t()), x)
        return out if own is None else out.add_(own.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        weight_slot, bias_slot = ctx.slots
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            is_common = weight.dim() == 2
            of_x = _rows(torch.mm(gradient.flatten(0, 1), weight), x) if is_common else gradient.bmm(weight)
        if ctx.needs_input_grad[1]:  # which may move the weights: nothing reads them from here on
            if weight_slot is not None:
                weight_slot.add_product(gradient, x)
            else:
                of_weight = torch.bmm(gradient.mT, x)
        if ctx.needs_input_grad[2]:
            if bias_slot is not None:
                bias_slot.add_rows(gradient)
            else:
                of_bias = gradient.sum(1)
        return of_x, of_weight, of_bias, None, None


def _rows(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[K N, ...] to [K, N, ...], as of another tensor."""
    return flat.view(*like.shape[:2], -1)
