"""Clipping each client's whole update (Sun et al., 2019, Can You Really Backdoor Federated Learning?, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from fedmp.aggregate.aggregator import check_updates
from fedmp.aggregate.distances import combination, gram
from fedmp.component import Component

__all__ = ["NormClipping"]


class NormClipping(Component):
    """The mean of updates, each shortened to a bound on its 2-norm over all tensors.

        u = sum_i a_i u_i min(1, M / ||u_i||)

    Bounds what one client can do: it moves the result by a_i M at most, which ends attacks that live of size
    (scaling). It does not tell a wrong direction, so a share of Byzantine clients still takes its share: use
    `CenteredClipping` or a median against those. With the median of norms as bound, the breakdown point of the
    bound is 1/2. The result may be shorter than any update: it lies in the hull of the updates and zero.

    Counters and flags are the median of all clients', whatever the weights.

    Args:
        bound: M; None for the median of the round's norms.
        weighted: a_i are the clients' shares of samples, as they report them; by default all count equally.
    """

    bound: float | None = Field(default=None, gt=0)
    weighted: bool = False

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """The mean of clipped updates.

        Raises:
            ValueError: no updates, weights that do not fit them, or numbers that are not finite.
        """
        check_updates(updates, weights)
        counted = torch.tensor(weights if self.weighted else [1.0] * len(updates), dtype=torch.float64)
        norms = gram(updates).diagonal().sqrt()
        bound = float(norms.quantile(0.5)) if self.bound is None else self.bound
        scales = (bound / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)
        return combination(updates, (counted / counted.sum() * scales).tolist())
