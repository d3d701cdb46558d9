"""Centered clipping (Karimireddy et al., 2021, Learning from History for Byzantine Robust Optimization)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from fedmp.aggregate.aggregator import check_updates
from fedmp.aggregate.distances import combination, gram, squared_distances, squared_distances_to
from fedmp.component import Component

__all__ = ["CenteredClipping"]


class CenteredClipping(Component):
    """The mean of updates, each clipped in its distance from a centre, which moves to the result.

        v <- v + 1/n sum_i (u_i - v) min(1, tau / ||u_i - v||)

    The paper starts from the previous round's result, which clients' momentum keeps near; we keep no
    state and start from the client whose median distance to the others is the least. Each
    iterate is a weighted mean of updates, so all follows from their inner products, as in `GeometricMedian`.
    Withstands less than half of the clients, each of which moves v by tau / n at most in an iteration. Clients
    count equally, whatever their weights. Counters and flags are the median of all clients'.

    Args:
        radius: tau; None for the median of the clients' distances from v, anew in each iteration.
        num_iterations: how often; the paper finds one enough when v is known well.
    """

    radius: float | None = Field(default=None, gt=0)
    num_iterations: int = Field(default=5, ge=1)

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """The clipped mean of whole updates; weights are checked and not used.

        Raises:
            ValueError: no updates, weights that do not fit them, or numbers that are not finite.
        """
        check_updates(updates, weights)
        products = gram(updates)
        num_clients = len(updates)
        middle = int(squared_distances(products).quantile(0.5, dim=1).argmin())
        current = torch.zeros(num_clients, dtype=torch.float64)
        current[middle] = 1.0
        for _ in range(self.num_iterations):
            distances = squared_distances_to(products, current).sqrt()
            radius = float(distances.quantile(0.5)) if self.radius is None else self.radius
            scales = (radius / distances.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)
            pulls = scales / num_clients
            current = (1 - pulls.sum()) * current + pulls
        return combination(updates, current.tolist())
