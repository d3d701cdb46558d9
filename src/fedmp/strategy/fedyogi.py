"""FedYogi (Reddi et al., 2021, Adaptive Federated Optimization, algorithm 2).

    m' = beta_1 m + (1 - beta_1) update,      v' = v - (1 - beta_2) update^2 sign(v - update^2),
    x' = x + eta m' / (sqrt(v') + tau),       v begins at tau^2

is `Yogi` on the pseudo-gradient -update. Where we differ: not at all.
"""

from __future__ import annotations

from functools import partial

from fedmp.strategy.adaptive import AdaptiveServer
from fedmp.strategy.strategy import ServerOptimizer
from fedmp.strategy.yogi import Yogi

__all__ = ["FedYogi"]


class FedYogi(AdaptiveServer):
    """FedAvg with Yogi at the server, whose step sizes grow back slowly. Fields as `AdaptiveServer` has them."""

    @property
    def server_optimizer(self) -> ServerOptimizer | None:
        """Yogi."""
        return partial(Yogi, lr=self.server_rate, betas=(self.beta1, self.beta2), eps=self.tau)
