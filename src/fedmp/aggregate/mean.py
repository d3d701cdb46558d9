"""The sample-weighted mean of updates (McMahan et al., 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from fedmp.aggregate.aggregator import check_updates
from fedmp.aggregate.blocks import weighted_sum
from fedmp.component import Component

__all__ = ["SummedUpdates", "WeightedMean"]


@runtime_checkable
class SummedUpdates(Protocol):
    """Updates whose weighted sum was made where they were: the simulator's, which never holds all of them."""

    def weighted_mean(self, weights: Sequence[float]) -> dict[str, torch.Tensor] | None:
        """Their mean; None if they were summed with other weights."""
        ...


class WeightedMean(Component):
    """The mean, each client weighted by the samples that it processed.

    Tensors are reduced one name at a time and always in client order, so memory stays near one tensor
    and the result does not depend on who came first. Integer tensors (counters) are rounded.

    Breakdown point 0: a single client can move the result anywhere.
    """

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """Weighted mean, tensor by tensor.

        Raises:
            ValueError: no updates, or weights that are not positive or not one an update.
        """
        check_updates(updates, weights)
        if isinstance(updates, SummedUpdates) and (mean := updates.weighted_mean(weights)) is not None:
            return mean
        total = sum(weights)
        shares = [weight / total for weight in weights]
        return {name: weighted_sum(updates, name, shares) for name in updates[0]}
