"""Federated averaging (McMahan et al., 2017, Communication-Efficient Learning, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from pydantic import Field

from fedmp.seeds import derive_seed
from fedmp.strategy.closing import Closing, ClosingRules

__all__ = ["FedAvg", "Strategy"]


@runtime_checkable
class Strategy(Protocol):
    """Who takes part, how much local work they do, and when a round may close."""

    @property
    def local_epochs(self) -> float:
        """Passes over the client's data in one round; may be a fraction."""
        ...

    @property
    def local_steps(self) -> int | None:
        """Optimizer steps in one round; None for whole epochs."""
        ...

    @property
    def keep_statistics_local(self) -> bool:
        """Whether batch-norm statistics stay at the clients."""
        ...

    def closing(self, num_clients: int) -> Closing:
        """How many train at a time, and when a round closes, in a job with so many clients."""
        ...

    def cohort(
        self, clients: Sequence[str], *, round: int, seed: int, size: int | None = None
    ) -> tuple[str, ...]:
        """The clients that begin with one round, in client order: so many of these, or as it says itself."""
        ...


class FedAvg(ClosingRules):
    """Local training on a sampled cohort, then the sample-weighted mean of the updates.

    Args:
        local_epochs: passes over the client's data in one round; 0.25 averages four times in a pass.
        local_steps: if given, so many optimizer steps instead, going round the data as often as needed.
        keep_statistics_local: leave batch-norm statistics at the clients instead of averaging them
            (the server's own copy then stays as it began).

    How large a cohort is, and when a round closes, is said with the fields of `ClosingRules`.
    """

    local_epochs: float = Field(default=1, gt=0)
    local_steps: int | None = Field(default=None, ge=1)
    keep_statistics_local: bool = False

    def cohort(
        self, clients: Sequence[str], *, round: int, seed: int, size: int | None = None
    ) -> tuple[str, ...]:
        """A uniform sample without replacement, the same for the same seed."""
        size = self.closing(len(clients)).num_training if size is None else size
        generator = torch.Generator().manual_seed(derive_seed(seed, "cohort", round))
        chosen = set(torch.randperm(len(clients), generator=generator)[:size].tolist())
        return tuple(name for index, name in enumerate(clients) if index in chosen)
