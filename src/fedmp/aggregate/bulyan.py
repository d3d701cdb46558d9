"""Bulyan over Krum (El Mhamdi et al., 2018, The Hidden Vulnerability of Distributed Learning, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from fedmp.aggregate.aggregator import check_tolerance, check_updates
from fedmp.aggregate.blocks import combine_sorted
from fedmp.aggregate.distances import gram, is_floating, squared_distances
from fedmp.aggregate.krum import krum_scores
from fedmp.aggregate.median import median_of
from fedmp.component import Component

__all__ = ["Bulyan"]


class Bulyan(Component):
    """Krum chooses clients one by one; of their values, each element averages those around the median.

    1. Theta = n - 2f clients: the one with the best Krum score among those left, again and again.
    2. u[j] = mean of the beta = theta - 2f values of the chosen that are nearest to their median.

    Withstands f Byzantine clients of n >= 4f + 3, and bounds each element's error, which Krum alone does not:
    a Byzantine client may be close as a whole and far off in a single element. While clients are
    chosen, scores count the m - f - 2 nearest of the m left, one at least. Clients count equally, whatever
    their weights. Counters and flags are the median of all clients'.

    Args:
        num_byzantine: f; None for the most that each round's n allows, (n - 3) // 4.
    """

    num_byzantine: int | None = Field(default=None, ge=0)

    def check_clients(self, num_clients: int) -> None:
        """Refuse fewer than 4f + 3.

        Raises:
            ConfigError: as said.
        """
        self._tolerated(num_clients)

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """Bulyan of whole updates; weights are checked and not used.

        Raises:
            ConfigError: there are fewer clients than 4f + 3.
            ValueError: no updates, weights that do not fit them, or numbers that are not finite.
        """
        check_updates(updates, weights)
        tolerated = self._tolerated(len(updates))
        chosen = _choose(squared_distances(gram(updates)), tolerated)
        kept = [updates[index] for index in chosen]

        def around_median(values: torch.Tensor) -> torch.Tensor:
            return _mean_around_median(values, len(kept) - 2 * tolerated)

        return {
            name: combine_sorted(kept, name, around_median)
            if is_floating(updates[0][name])
            else median_of(updates, name)
            for name in updates[0]
        }

    def _tolerated(self, num_clients: int) -> int:
        return check_tolerance("Bulyan", num_clients, self.num_byzantine, factor=4)


def _choose(distances: torch.Tensor, num_byzantine: int) -> list[int]:
    """Theta clients by repeated Krum, in client order."""
    left = list(range(len(distances)))
    chosen = []
    for _ in range(len(distances) - 2 * num_byzantine):
        scores = krum_scores(distances[left][:, left], num_byzantine) if len(left) > 1 else torch.zeros(1)
        chosen.append(left.pop(int(scores.argmin())))
    return sorted(chosen)


def _mean_around_median(values: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The mean of the values nearest to the median: neighbours in sorted order, so one of a few windows.

    Args:
        values: [elements, clients], ascending.
        num_kept: size of the window.
    """
    num = values.shape[1]
    exact = values.double()
    median = (exact[:, (num - 1) // 2] + exact[:, num // 2]) / 2
    num_windows = num - num_kept + 1
    ends = torch.stack([exact[:, :num_windows], exact[:, num_kept - 1 :]])
    widest = (ends - median[None, :, None]).abs().amax(dim=0)
    first = widest.argmin(dim=1, keepdim=True)
    window = first + torch.arange(num_kept)
    return exact.gather(1, window).mean(dim=1)
