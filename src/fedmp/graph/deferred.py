"""Layers that add the gradient of their weight to `grad` themselves: in place, and later if asked to.

Autograd makes a weight's gradient anew for every micro-batch and then adds it; for a large weight that
costs its memory once more, and two passes through it. Here the product is added as it is computed. Pipelines
run so, and layers are measured so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

__all__ = ["LARGE_WEIGHT", "WeightGradients", "deferred_module"]

LARGE_WEIGHT = 1 << 18  # elements; for smaller ones, autograd is faster

Work = Callable[[], None]


class WeightGradients:
    """The weight gradients that are still to be computed, by micro-batch.

    Args:
        is_deferred: whether to leave them until `compute`, rather than compute them at once.
    """

    def __init__(self, *, is_deferred: bool) -> None:
        self._is_deferred = is_deferred
        self._current: list[Work] = []
        self._waiting: dict[int, list[Work]] = {}

    def add(self, work: Work) -> None:
        """Work of the backward that runs."""
        if self._is_deferred:
            self._current.append(work)
        else:
            work()

    def begin(self, microbatch: int) -> None:
        """A backward of inputs starts."""
        self._current = self._waiting[microbatch] = []

    def compute(self, microbatch: int) -> None:
        """Compute what a micro-batch left, and add it to the parameters' `grad`."""
        for work in self._waiting.pop(microbatch):
            work()

    def clear(self) -> None:
        """Forget everything, after an error."""
        self._current = []
        self._waiting.clear()


def deferred_module(
    node: fx.Node, store: WeightGradients, sizes: Mapping[Any, int], *, smallest: int
) -> nn.Module | None:
    """What to call in place of a node so that it leaves its weight's gradient to `store`.

    Args:
        node: of a graph of ATen calls.
        store: where the work that remains is kept.
        sizes: elements of each parameter, by its placeholder.
        smallest: weights of fewer elements stay with autograd.

    Returns:
        None for other calls than linear layers and convolutions of parameters.
    """
    if len(node.args) < 2 or sizes.get(node.args[1], -1) < smallest:
        return None
    if len(node.args) > 2 and node.args[2] is not None and node.args[2] not in sizes:
        return None
    if node.target is torch.ops.aten.linear.default:
        return _DeferredLinear(store)
    if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.conv1d.default):
        return _DeferredConvolution(store, 2 if node.target is torch.ops.aten.conv2d.default else 1)
    return None


class _DeferredLinear(nn.Module):
    """`aten.linear`, the gradient of its weight left to `store`."""

    def __init__(self, store: WeightGradients) -> None:
        super().__init__()
        self._store = store

    def forward(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`inputs @ weight.T + bias`."""
        return _apply(_Linear, inputs, weight, bias, self._store)


class _DeferredConvolution(nn.Module):
    """`aten.conv1d` or `aten.conv2d`, the gradient of its weight left to `store`."""

    def __init__(self, store: WeightGradients, num_dims: int) -> None:
        super().__init__()
        self._store = store
        self._num_dims = num_dims

    def forward(
        self,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> torch.Tensor:
        """The convolution."""
        sizes = ([*each] * (self._num_dims // len(each)) for each in (stride, padding, dilation))
        settings = (*sizes, groups)
        return _apply(_Convolution, inputs, weight, bias, settings, self._store)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        store: WeightGradients,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.bias, ctx.store = weight, bias, store
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        (inputs,) = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias

        def later() -> None:
            rows = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient[None]
            if weight.requires_grad:
                _add_product(weight, rows.T, inputs.to(rows.dtype).reshape(rows.shape[0], -1))
            if bias is not None and bias.requires_grad:
                _add(bias, rows.sum(0))

        ctx.store.add(later)
        wanted = gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return wanted, None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        settings: tuple[list[int], list[int], list[int], int],
        store: WeightGradients,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.bias, ctx.settings, ctx.store = weight, bias, settings, store
        stride, padding, dilation, groups = settings
        zeros = [0] * len(stride)
        result: torch.Tensor = torch.ops.aten.convolution.default(
            inputs, weight, bias, stride, padding, dilation, False, zeros, groups
        )
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        (inputs,) = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        stride, padding, dilation, groups = ctx.settings

        def part(mask: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward.default(
                gradient,
                inputs.to(gradient.dtype),
                weight.to(gradient.dtype),
                None if bias is None else list(bias.shape),
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                mask,
            )

        def later() -> None:
            with_bias = bias is not None and bias.requires_grad
            _, of_weight, of_bias = part([False, weight.requires_grad, with_bias])
            if weight.requires_grad:
                _add(weight, of_weight)
            if with_bias:
                _add(bias, of_bias)

        ctx.store.add(later)
        wanted = part([True, False, False])[0] if ctx.needs_input_grad[0] else None
        return wanted, None, None, None, None


def _apply(function: Any, *args: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*args)
    return result


def _add_product(parameter: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if parameter.grad is not None and parameter.dtype == left.dtype:
        parameter.grad.addmm_(left, right)
    else:
        _add(parameter, left @ right)


def _add(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    gradient = gradient.detach().to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
