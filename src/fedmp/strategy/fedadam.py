"""FedAdam (Reddi et al., 2021, Adaptive Federated Optimization, algorithm 2).

    m' = beta_1 m + (1 - beta_1) update,      v' = beta_2 v + (1 - beta_2) update^2,
    x' = x + eta m' / (sqrt(v') + tau)

is Adam on the pseudo-gradient -update. Where we differ: `torch.optim.Adam` corrects the bias of m and v in the first
rounds (Kingma and Ba, 2015), which the paper's algorithm does not, and so begins with v = 0 instead of tau^2.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.strategy import ServerOptimizer

__all__ = ["FedAdam"]


class FedAdam(FedAvg):
    """FedAvg with Adam at the server.

    Args:
        server_rate: learning rate of the server, eta.
        beta1, beta2: decay of the first and the second moment.
        tau: how adaptive: large values come close to FedAvg with momentum.
    """

    server_rate: float = Field(default=0.01, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)

    @property
    def server_optimizer(self) -> ServerOptimizer | None:
        """Adam."""
        return partial(torch.optim.Adam, lr=self.server_rate, betas=(self.beta1, self.beta2), eps=self.tau)
