"""FedAvgM (Hsu et al., 2019, Measuring the Effects of Non-Identical Data Distribution, section 4.3).

    v' = beta v + update,      x' = x + eta v'

is SGD with momentum on the pseudo-gradient -update. Where we differ: not at all; the paper's eta is 1.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.strategy import ServerOptimizer

__all__ = ["FedAvgM"]


class FedAvgM(FedAvg):
    """FedAvg with momentum at the server.

    Args:
        server_rate: learning rate of the server, eta.
        momentum: beta; the paper uses 0.7 to 0.997 with hundreds of clients, few want less.
        nesterov: look ahead along the momentum.
    """

    server_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.5, gt=0, lt=1)
    nesterov: bool = False

    @property
    def server_optimizer(self) -> ServerOptimizer | None:
        """SGD with momentum."""
        return partial(torch.optim.SGD, lr=self.server_rate, momentum=self.momentum, nesterov=self.nesterov)
