"""The geometric median of updates (Pillutla et al., 2019, Robust Aggregation for Federated Learning, RFA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from fedmp.aggregate.aggregator import check_updates
from fedmp.aggregate.distances import combination, gram, squared_distances, squared_distances_to
from fedmp.component import Component

__all__ = ["GeometricMedian"]


class GeometricMedian(Component):
    """The point with the least sum of distances to the clients' updates, by the smoothed Weiszfeld algorithm.

        v = argmin sum_i a_i ||v - u_i||;   b_i = a_i / max(nu, ||v - u_i||),  v <- sum_i b_i u_i / sum_i b_i

    Breakdown point 1/2 of the weight a. Every iterate is a weighted mean of updates, so all distances follow
    from the clients' inner products: the updates are read twice, whatever the number of iterations. Hence we
    iterate until v stands still, where the paper, which pays a secure aggregation for each step, makes
    three, and begin at the most central client, where it begins at the mean, which outliers of any size move.
    nu is a share of the clients' typical distance, where the paper's is 1e-6 for any model.

    Counters and flags are the median of all clients', whatever the weights.

    Args:
        weighted: a_i are the clients' samples, as in the paper. By default all clients count equally, for a
            sample count is a number that a client reports itself.
        smoothing: nu, as a share of the median distance from the most central client.
        max_iterations: at most so many steps.
        tolerance: stop once no client's coefficient moves by more than this.
    """

    weighted: bool = False
    smoothing: float = Field(default=1e-6, gt=0)
    max_iterations: int = Field(default=1000, ge=1)
    tolerance: float = Field(default=1e-9, gt=0)

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """The geometric median of whole updates.

        Raises:
            ValueError: no updates, weights that do not fit them, or numbers that are not finite.
        """
        check_updates(updates, weights)
        counted = torch.tensor(weights if self.weighted else [1.0] * len(updates), dtype=torch.float64)
        return combination(updates, self.coefficients(gram(updates), counted / counted.sum()).tolist())

    def coefficients(self, products: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Those of the geometric median as a mean of the updates.

        Args:
            products: inner products of the updates, [n, n] float64.
            shares: a, [n] float64, of sum 1.
        """
        distances = _from_the_middle(products)
        away = distances[distances > 0]
        if len(away) == 0:  # all updates are equal
            return shares
        # where most are equal, the others' distance is no measure of anything
        typical = float(distances.quantile(0.5)) or self.smoothing * float(away.min())
        current = _pull(shares, distances.clamp(min=typical))
        for _ in range(self.max_iterations):
            distances = squared_distances_to(products, current).sqrt()
            following = _pull(shares, distances.clamp(min=self.smoothing * typical))
            moved = float((following - current).abs().max())
            current = following
            if moved <= self.tolerance:
                break
        return current


def _from_the_middle(products: torch.Tensor) -> torch.Tensor:
    """Distances of all from the client whose median distance to the others is the least."""
    distances = squared_distances(products).sqrt()
    return distances[int(distances.quantile(0.5, dim=1).argmin())]


def _pull(shares: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    pulls = shares / distances
    return pulls / pulls.sum()
