"""DiLoCo (Douillard et al., 2023, Distributed Low-Communication Training of Language Models, algorithm 1).

Few clients make many local steps with AdamW, and keep its moments from round to round; the server follows the mean
update with Nesterov momentum:

    inner: H steps of AdamW from x_t on client i give y_i;      outer: x_{t+1} = Nesterov(x_t, -mean_i (y_i - x_t)).

The outer optimizer is SGD with lr 0.7 and momentum 0.9, as the paper found best. The inner one is the job's client
optimizer (`optimizer=adamw`, which `strategy=diloco` picks on the command line). Where we differ: not at all; the mean
is the job's aggregator's, with all clients weighted alike.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.strategy import ServerOptimizer

__all__ = ["DiLoCo"]


class DiLoCo(FedAvg):
    """Many local steps with optimizer state kept, outer Nesterov momentum.

    Args:
        local_steps: between two synchronisations, H; the paper uses 500.
        server_rate, momentum: of the outer optimizer.
    """

    local_steps: int | None = Field(default=500, ge=1)
    server_rate: float = Field(default=0.7, gt=0)
    momentum: float = Field(default=0.9, gt=0, lt=1)
    weighting: Literal["processed", "samples", "uniform"] = "uniform"

    @property
    def keeps_optimizer(self) -> bool:
        """True: the moments of the inner optimizer live on."""
        return True

    @property
    def server_optimizer(self) -> ServerOptimizer | None:
        """SGD with Nesterov momentum."""
        return partial(torch.optim.SGD, lr=self.server_rate, momentum=self.momentum, nesterov=True)
