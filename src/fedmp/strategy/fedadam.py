"""FedAdam (Reddi et al., 2021, Adaptive Federated Optimization, algorithm 2).

    m' = beta_1 m + (1 - beta_1) update,      v' = beta_2 v + (1 - beta_2) update^2,
    x' = x + eta m' / (sqrt(v') + tau)

is Adam on the pseudo-gradient -update. Where we differ: `torch.optim.Adam` corrects the bias of m and v in the first
rounds (Kingma and Ba, 2015), which the paper's algorithm does not, and so begins with v = 0 instead of tau^2.
"""

from __future__ import annotations

from functools import partial

import torch

from fedmp.strategy.adaptive import AdaptiveServer
from fedmp.strategy.strategy import ServerOptimizer

__all__ = ["FedAdam"]


class FedAdam(AdaptiveServer):
    """FedAvg with Adam at the server. Fields as `AdaptiveServer` has them."""

    @property
    def server_optimizer(self) -> ServerOptimizer | None:
        """Adam."""
        return partial(torch.optim.Adam, lr=self.server_rate, betas=(self.beta1, self.beta2), eps=self.tau)
