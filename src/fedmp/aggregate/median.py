"""The coordinate-wise median of updates (Yin et al., 2018, Byzantine-Robust Distributed Learning, definition 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedmp.aggregate.aggregator import check_updates
from fedmp.aggregate.blocks import combine_sorted
from fedmp.component import Component

__all__ = ["CoordinateMedian", "median_of"]


class CoordinateMedian(Component):
    """Each element is the median of the clients' values for it; between the two middle ones if n is even.

        u[j] = median(u_1[j], ..., u_n[j])

    Breakdown point 1/2: every element stays within the range of the honest clients' values while they are
    the majority. Clients count equally, whatever their weights: a weight is a number that the client itself
    reports, and a weighted median would hand half of the vote to whoever reports enough samples. On
    strongly unlike clients the median of an element may be far from the mean even without an attack.

    Counters keep whole numbers, rounded down; a flag is set where more than half of the clients set it.
    """

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """Median, tensor by tensor; weights are checked and not used.

        Raises:
            ValueError: no updates, weights that do not fit them, or numbers that are not finite.
        """
        check_updates(updates, weights)
        return {name: median_of(updates, name) for name in updates[0]}


def median_of(updates: Sequence[Mapping[str, torch.Tensor]], name: str) -> torch.Tensor:
    """The coordinate-wise median of one tensor."""
    return combine_sorted(updates, name, _middle)


def _middle(values: torch.Tensor) -> torch.Tensor:
    low, high = values[:, (values.shape[1] - 1) // 2], values[:, values.shape[1] // 2]
    if values.shape[1] % 2 == 1:
        return low
    if values.dtype == torch.int64:  # the mean rounded down, which no two integers overflow
        return (low & high) + ((low ^ high) >> 1)
    return low * 0.5 + high * 0.5
