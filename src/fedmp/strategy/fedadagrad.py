"""FedAdagrad (Reddi et al., 2021, Adaptive Federated Optimization, algorithm 2).

    v' = v + update^2,      x' = x + eta update / (sqrt(v') + tau)

is `torch.optim.Adagrad` on the pseudo-gradient -update. v begins at tau^2, as the paper has it. Where we differ: the
paper's algorithm has a first moment too, which its FedAdagrad switches off (beta_1 = 0, appendix D.2), and so do we.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.strategy import ServerOptimizer

__all__ = ["FedAdagrad"]


class FedAdagrad(FedAvg):
    """FedAvg with Adagrad at the server.

    Args:
        server_rate: learning rate of the server, eta.
        tau: how adaptive: large values come close to FedAvg.
    """

    server_rate: float = Field(default=0.1, gt=0)
    tau: float = Field(default=1e-3, gt=0)

    @property
    def server_optimizer(self) -> ServerOptimizer | None:
        """Adagrad."""
        return partial(
            torch.optim.Adagrad, lr=self.server_rate, eps=self.tau, initial_accumulator_value=self.tau**2
        )
