"""The coordinate-wise trimmed mean (Yin et al., 2018, Byzantine-Robust Distributed Learning, definition 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from fedmp.aggregate.aggregator import check_updates
from fedmp.aggregate.blocks import combine_sorted
from fedmp.component import Component
from fedmp.errors import ConfigError

__all__ = ["TrimmedMean"]


class TrimmedMean(Component):
    """Each element is the mean of the clients' values for it, without the largest and the smallest.

        u[j] = mean of u_(k+1)[j] <= ... <= u_(n-k)[j],   k = ceil(trim * n)

    Breakdown point `trim`: every element stays within the range of the honest values while at most k clients
    are Byzantine. Clients count equally, whatever their weights, which are numbers that they report themselves.
    The paper takes floor(trim * n); we round up, so that a share of `trim` Byzantine clients is always covered.

    Counters are trimmed and rounded alike; a flag is set where more than half of the remaining clients set it.

    Args:
        trim: share of the clients dropped at each end, at least 0 and below 0.5.
    """

    trim: float = Field(default=0.2, ge=0, lt=0.5)

    def check_clients(self, num_clients: int) -> None:
        """Refuse so few that nothing would be left of them.

        Raises:
            ConfigError: as said.
        """
        self._cut(num_clients)

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """Trimmed mean, tensor by tensor; weights are checked and not used.

        Raises:
            ConfigError: nothing would be left of so few clients.
            ValueError: no updates, weights that do not fit them, or numbers that are not finite.
        """
        check_updates(updates, weights)
        num_clients = len(updates)
        cut = self._cut(num_clients)

        def mean_of_rest(values: torch.Tensor) -> torch.Tensor:
            rest = values[:, cut : num_clients - cut]
            return rest.mean(dim=1, dtype=torch.float64)

        return {name: combine_sorted(updates, name, mean_of_rest) for name in updates[0]}

    def _cut(self, num_clients: int) -> int:
        """How many of so many clients are dropped at each end."""
        cut = math.ceil(self.trim * num_clients - 1e-9)
        if 2 * cut >= num_clients:
            raise ConfigError(
                f"TrimmedMean with trim={self.trim:g} drops {cut} of {num_clients} clients at each end, which "
                f"leaves none; use more clients a round, a trim of at most "
                f"{(num_clients - 1) // 2 / num_clients:.3g}, or CoordinateMedian"
            )
        return cut
