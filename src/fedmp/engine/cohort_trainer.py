"""What trains a round's clients in this process: many at once, one by one, or shared out over several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from fedmp.coordinator import ClientUpdate
from fedmp.engine.population import SomeClients

__all__ = ["CohortTrainer"]


class CohortTrainer(Protocol):
    """A way to train clients in this process."""

    def train(
        self,
        cohort: SomeClients,
        *,
        round: int,
        states: Mapping[str, str],
        handed_out: Mapping[str, torch.Tensor],
        keep: bool,
    ) -> Sequence[ClientUpdate]:
        """Train from what the coordinator hands out, which stays as it is.

        Args:
            cohort: who trains.
            round: seeds the order of the batches.
            states: names what each client kept, from which it starts.
            handed_out: the global model and what goes with it, as clients receive it.
            keep: whether each update is wanted. Otherwise their mean may be all that there is, weighted by the
                samples that each client processed (`fedmp.aggregate.SummedUpdates`).

        Returns:
            The clients' updates, in the order of the cohort; each may still be read after later calls.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        ...
