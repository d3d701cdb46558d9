"""A linear layer of many clients, whose backward writes the weights' gradient where the optimizer wants it.

Shape letters: K clients, N rows, I and O features in and out.
"""

from __future__ import annotations

from typing import Any

import torch

from fedmp.cohort.stacked import Slot

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
        ctx.save_for_backward(x, weight)
        ctx.slots = weight_slot, bias_slot
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias.as_subclass(torch.Tensor).unsqueeze(1), x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        weight_slot, bias_slot = ctx.slots
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.bmm(gradient, weight)
        if ctx.needs_input_grad[1]:
            if weight_slot is not None:
                weight_slot.add_product(gradient.transpose(1, 2), x)
            else:
                of_weight = torch.bmm(gradient.transpose(1, 2), x)
        if ctx.needs_input_grad[2]:
            if bias_slot is not None:
                bias_slot.add_rows(gradient)
            else:
                of_bias = gradient.sum(1)
        return of_x, of_weight, of_bias, None, None
