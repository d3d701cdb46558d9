"""Federated averaging (McMahan et al., 2017, Communication-Efficient Learning, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.seeds import derive_seed

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

    @property
    def min_clients(self) -> int | None:
        """Clients of a cohort that must finish a round, for it to be committed; None for all of them."""
        ...

    def cohort(self, clients: Sequence[str], *, round: int, seed: int) -> tuple[str, ...]:
        """The clients of one round, in client order."""
        ...


class FedAvg(Component):
    """Local training on a sampled cohort, then the sample-weighted mean of the updates.

    Args:
        local_epochs: passes over the client's data in one round; 0.25 averages four times in a pass.
        local_steps: if given, so many optimizer steps instead, going round the data as often as needed.
        fraction: share of the clients in each round's cohort; at least one client.
        keep_statistics_local: leave batch-norm statistics at the clients instead of averaging them
            (the server's own copy then stays as it began).
        min_clients: commit a round without those of its cohort that cannot finish it, or not in time, if at
            least so many have; None needs all.
    """

    local_epochs: float = Field(default=1, gt=0)
    local_steps: int | None = Field(default=None, ge=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    keep_statistics_local: bool = False
    min_clients: int | None = Field(default=None, ge=1)

    def cohort(self, clients: Sequence[str], *, round: int, seed: int) -> tuple[str, ...]:
        """A uniform sample without replacement, the same for the same seed."""
        size = max(1, math.ceil(self.fraction * len(clients) - 1e-9))
        generator = torch.Generator().manual_seed(derive_seed(seed, "cohort", round))
        chosen = set(torch.randperm(len(clients), generator=generator)[:size].tolist())
        return tuple(name for index, name in enumerate(clients) if index in chosen)
