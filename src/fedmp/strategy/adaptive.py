"""What the adaptive strategies with two moments share: FedAdam and FedYogi."""

from __future__ import annotations

from pydantic import Field

from fedmp.strategy.fedavg import FedAvg

__all__ = ["AdaptiveServer"]


class AdaptiveServer(FedAvg):
    """FedAvg with an optimizer at the server that keeps a first and a second moment.

    Args:
        server_rate: learning rate of the server, eta.
        beta1, beta2: decay of the first and the second moment.
        tau: how adaptive: large values come close to FedAvg with momentum.
    """

    server_rate: float = Field(default=0.01, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)
