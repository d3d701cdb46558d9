"""q-FedAvg (Li et al., 2020, Fair Resource Allocation in Federated Learning, algorithm 2).

Minimises sum_k p_k / (q+1) F_k^{q+1}: clients with a high loss count for more, the more so the larger q is. With
F_k the loss of the round's starting model x on client k's data, and Dw_k = L (x - y_k),

    x' = x - sum_k F_k^q Dw_k / sum_k h_k,      h_k = q F_k^{q-1} |Dw_k|^2 + L F_k^q,

where |.| is over the whole model: the coordinator sums squares over the tensors of all of a client's stages. L, the
paper's estimate of the local Lipschitz constant, is one over the clients' learning rate. With q = 0 it is FedAvg with
all clients weighted alike.

Where we differ: buffers take the plain mean. The sum in the numerator is the job's aggregator's, with weights F_k^q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.rules import Scaled, ServerRound, ServerRule, Slots

__all__ = ["FairMean", "QFedAvg"]

_SMALLEST = 1e-10  # a loss of 0 would make a weight of 0; the authors' code adds the same


@dataclass(frozen=True)
class FairMean:
    """The mean weighted by powers of losses, with its own length of step.

    Attributes:
        q: the power.
        lipschitz: L; None for one over the clients' mean rate.
    """

    q: float
    lipschitz: float | None = None
    slots: tuple[str, ...] = ()

    def step(self, round: ServerRound) -> tuple[dict[str, torch.Tensor], Slots]:
        """`combine(updates, F^q) * L sum F^q / sum h`."""
        updates, parameters = round.updates, round.parameters
        scale = self.lipschitz or sum(u.num_steps for u in updates) / sum(u.rate_sum for u in updates)
        powers, curvature = [], 0.0
        for weight, update in zip(round.weights, updates, strict=True):
            loss = (update.start_loss or 0.0) + _SMALLEST
            powers.append(weight * loss**self.q)
            norm = scale**2 * sum(_square_sum(update[name]) for name in update if name in parameters)
            curvature += weight * (self.q * loss ** (self.q - 1) * norm + scale * loss**self.q)
        mean = round.combine(updates, powers)
        return dict(Scaled(mean, scale * sum(powers) / curvature, parameters)), round.slots


class QFedAvg(FedAvg):
    """FedAvg that is fairer: it lowers high losses first.

    Args:
        q: how much so; 0 not at all. The paper uses 0.001 to 5.
        lipschitz: L; None for one over the clients' mean learning rate.
    """

    q: float = Field(default=1.0, ge=0)
    lipschitz: float | None = Field(default=None, gt=0)
    weighting: Literal["processed", "samples", "uniform"] = "uniform"

    @property
    def needs_losses(self) -> bool:
        """True: the starting model's loss on each client's data."""
        return True

    @property
    def server_rule(self) -> ServerRule | None:
        """The fair mean."""
        return FairMean(self.q, self.lipschitz)


def _square_sum(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
