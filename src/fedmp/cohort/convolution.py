"""A convolution of many clients as one grouped convolution, whose backward hands the weights' gradient to its slot.

Shape letters: K clients, B batch, C and O channels in and out, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fedmp.cohort.slot import Slot

__all__ = ["Sizes", "grouped_convolution"]

_LAST = torch.channels_last


class Sizes(NamedTuple):
    """How a convolution of images goes, and how many groups it has for all clients together."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def grouped_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sizes: Sizes
) -> torch.Tensor:
    """[B, K C, H, W], channels last, by [K, O, C, h, w], plus [K, O], to [B, K O, H', W'], channels last."""
    slots = (getattr(weight, "slot", None), getattr(bias, "slot", None))
    result: torch.Tensor = _Convolution.apply(x, weight, bias, sizes, *slots)  # type: ignore[no-untyped-call]
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sizes: Sizes,
        weight_slot: Slot | None,
        bias_slot: Slot | None,
    ) -> torch.Tensor:
        x, weight = x.as_subclass(torch.Tensor), weight.as_subclass(torch.Tensor)
        # brought in order once: the convolution, and again its backward, would do it otherwise
        kernels = weight.flatten(0, 1).contiguous(memory_format=_LAST)
        ctx.save_for_backward(x, kernels)
        ctx.sizes, ctx.slots = sizes, (weight_slot, bias_slot)
        ctx.shapes = weight.shape, weight.shape[:2]
        flat_bias = None if bias is None else bias.as_subclass(torch.Tensor).reshape(-1)
        return torch.conv2d(x, kernels, flat_bias, *sizes)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, kernels = ctx.saved_tensors
        of_x, *others = torch.ops.aten.convolution_backward(
            gradient.contiguous(memory_format=_LAST),
            x,
            kernels,
            [len(kernels)],
            *ctx.sizes[:3],
            False,
            [0, 0],
            ctx.sizes.groups,
            ctx.needs_input_grad[:3],
        )
        left: list[torch.Tensor | None] = []
        for own, slot, shape in zip(others, ctx.slots, ctx.shapes, strict=True):
            stacked = None if own is None else own.view(shape)
            if slot is not None and stacked is not None:
                slot.add(stacked)
            left.append(stacked if slot is None else None)
        return of_x, *left, None, None, None
