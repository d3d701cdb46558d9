"""The sample-weighted mean of updates (McMahan et al., 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from fedmp.component import Component

__all__ = ["Aggregator", "WeightedMean"]


@runtime_checkable
class Aggregator(Protocol):
    """A way to combine updates."""

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """One update from many.

        Args:
            updates: one a client, in client order, all with the same names, shapes and dtypes. A
                mapping may read its tensors from disk when asked, so take them one name at a time.
            weights: of the clients; positive.
        """
        ...


class WeightedMean(Component):
    """The mean, each client weighted by the samples that it processed.

    Tensors are reduced one name at a time and always in client order, so memory stays near one tensor
    and the result does not depend on who came first. Integer tensors (counters) are rounded.
    """

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """Weighted mean, tensor by tensor.

        Raises:
            ValueError: no updates, or weights that are not positive or not one an update.
        """
        if not updates or len(updates) != len(weights) or min(weights) <= 0:
            raise ValueError(f"{len(updates)} updates need as many positive weights, not {list(weights)}")
        total = sum(weights)
        shares = [weight / total for weight in weights]
        return {name: _mean((update[name] for update in updates), shares) for name in updates[0]}


def _mean(tensors: Iterable[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """The weighted sum of tensors that come one at a time and are not kept."""
    mean: torch.Tensor | None = None
    dtype = torch.float32
    for tensor, share in zip(tensors, shares, strict=True):
        if mean is None:
            dtype = tensor.dtype
            working = dtype if dtype in (torch.float32, torch.float64) else torch.float64
            mean = torch.zeros_like(tensor, dtype=working)
        mean.add_(tensor.to(mean.dtype), alpha=share)
    assert mean is not None
    if dtype == torch.bool:
        return mean > 0.5
    return (mean if dtype.is_floating_point else mean.round()).to(dtype)
