"""Library code that looks at tensor values without need, made traceable while a model is exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributions import Distribution
from torch.nn.modules import transformer

__all__ = ["traceable"]


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Leave out checks and choices of torch's own that depend on values but do not change results."""
    with _unvalidated_distributions(), _explicit_masks(), _idle_conversions(model):
        yield


@contextlib.contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """Checks of a distribution's parameters branch on tensor values."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextlib.contextmanager
def _explicit_masks() -> Iterator[None]:
    """`nn.Transformer` looks into a mask's values to see whether it is causal, to choose a faster kernel."""
    before = transformer._detect_is_causal_mask

    def detect(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    transformer._detect_is_causal_mask = detect
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


@contextlib.contextmanager
def _idle_conversions(model: nn.Module) -> Iterator[None]:
    """Let `module.to(dtype)` inside a forward pass when it changes nothing; torch refuses fake weights."""

    def guarded(module: nn.Module) -> Any:
        convert: Any = type(module)._apply

        def apply(fn: Any, recurse: bool = True) -> nn.Module:
            tensors = [*module.parameters(recurse), *module.buffers(recurse)]
            if all(fn(tensor) is tensor for tensor in tensors):
                return module
            converted: nn.Module = convert(module, fn, recurse)
            return converted

        return apply

    modules = list(model.modules())
    for module in modules:
        module.__dict__["_apply"] = guarded(module)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["_apply"]
