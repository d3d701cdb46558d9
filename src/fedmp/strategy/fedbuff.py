"""FedBuff (Nguyen et al., 2022, Federated Learning with Buffered Asynchronous Aggregation, algorithm 1).

    whenever K updates are in:  w <- w - eta_g / K  sum_i  (1 + tau_i)^(-1/2) (w_i - y_i)

with y_i the weights of a client after its local training from w_i, the global model as it was when that client
began, tau_i the number of global models since, and eta_g the learning rate of the server optimizer. Clients never
wait for each other: `concurrency` of them train at a time, and another one begins when one is done.

Where we differ: updates are weighted by the samples that the clients processed, as in federated averaging, of
which this is the asynchronous form: with K = `concurrency` = all clients it is the same, bit for bit. A client
takes part in a buffer once; it begins again with the next global model, since with the same one it would train
on the same batches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from fedmp.strategy.closing import Closing
from fedmp.strategy.fedavg import FedAvg

__all__ = ["FedBuff"]


class FedBuff(FedAvg):
    """Asynchronous federated averaging with a buffer: a "round" is one buffer.

    Args:
        buffer_size: K, the updates that make a global model.
        concurrency: clients that train at a time; None for all of them.
        late: always "stale": a client that a buffer did not wait for counts in a later one.
    """

    buffer_size: int = Field(default=10, ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    late: Literal["stale"] = "stale"

    @model_validator(mode="after")
    def _has_no_cohort(self) -> FedBuff:
        for name in ("fraction", "over_selection"):
            if name in self.model_fields_set:
                raise ValueError(
                    f"{name} is for strategies with cohorts; FedBuff has concurrency=NUMBER clients at a time and "
                    f"closes with buffer_size=NUMBER updates"
                )
        return self

    def closing(self, num_clients: int) -> Closing:
        """A buffer is full with K updates, or with all clients where there are fewer."""
        wanted = min(self.buffer_size, num_clients)
        return replace(
            super().closing(num_clients),
            num_training=min(self.concurrency or num_clients, num_clients),
            wanted=wanted,
            minimum=wanted if self.min_clients is None else min(self.min_clients, wanted),
            refills=True,
        )
