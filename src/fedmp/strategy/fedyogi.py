"""FedYogi (Reddi et al., 2021, Adaptive Federated Optimization, algorithm 2).

    m' = beta_1 m + (1 - beta_1) update,      v' = v - (1 - beta_2) update^2 sign(v - update^2),
    x' = x + eta m' / (sqrt(v') + tau),       v begins at tau^2

is `Yogi` on the pseudo-gradient -update. Where we differ: not at all.
"""

from __future__ import annotations

from functools import partial

from pydantic import Field

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.strategy import ServerOptimizer
from fedmp.strategy.yogi import Yogi

__all__ = ["FedYogi"]


class FedYogi(FedAvg):
    """FedAvg with Yogi at the server, whose step sizes grow back slowly.

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
        """Yogi."""
        return partial(Yogi, lr=self.server_rate, betas=(self.beta1, self.beta2), eps=self.tau)
