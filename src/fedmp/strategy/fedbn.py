"""FedBN (Li et al., 2021, Federated Learning on Non-IID Features via Local Batch Normalization, algorithm 1).

All parameters are averaged but those of batch normalisation, which stay at the client along with their statistics: they
hold what is peculiar to its inputs. A layer is a batch normalisation if it keeps running statistics.

What the clients train has no single model: each client's is the global one with its own normalisation. So the clients
evaluate the round's starting model, with their own normalisation, on their own data (`federated_accuracy` in the
metrics); the server's own test accuracy is of a model whose normalisation has never been trained.

Where we differ: the paper evaluates on test data of each client; here clients have training samples alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedmp.errors import ConfigError
from fedmp.graph import StateSpec
from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.scope import Scope, batch_norm_names

__all__ = ["FedBN"]


class FedBN(FedAvg):
    """FedAvg that leaves batch normalisation to the clients."""

    @property
    def needs_losses(self) -> bool:
        """True: only the clients can evaluate what they train."""
        return True

    def scope(self, specs: Mapping[str, StateSpec]) -> Scope:
        """All but batch normalisation travels.

        Raises:
            ConfigError: the model has none.
        """
        names = batch_norm_names(specs)
        if not names:
            raise ConfigError(
                "FedBN leaves batch normalisation at the clients, but the model has none that keeps statistics; "
                "use strategy=fedavg, with strategy.keep_local for other layers"
            )
        scope = super().scope(specs)
        return replace(scope, own=scope.own | names)
