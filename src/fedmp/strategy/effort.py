"""Unequal local work: how much of a round's work a client does, if not all of it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.seeds import derive_seed

__all__ = ["Effort", "Factors", "Stragglers"]


@runtime_checkable
class Effort(Protocol):
    """Decides how much of its local work a client does."""

    def share(self, client: str, *, round: int, seed: int) -> float:
        """From 0 to 1; the same for the same arguments. A client with 0 is not in the cohort.

        Args:
            client, round: who, when.
            seed: the job's.
        """
        ...


class Stragglers(Component):
    """Some of the clients, others in each round, do only a part of their work (Li et al., 2020, section 5.2).

    Where the paper draws whole numbers of epochs, a share of the work is drawn here, evenly between `least` and 1;
    it is rounded up to whole batches.

    Args:
        fraction: of the clients that are stragglers.
        least: share that a straggler does at least.
        drop: leave stragglers out of the cohort instead, as plain federated averaging does at a deadline.
    """

    fraction: float = Field(default=0.5, ge=0, le=1)
    least: float = Field(default=0.05, gt=0, le=1)
    drop: bool = False

    def share(self, client: str, *, round: int, seed: int) -> float:
        """1 for those who are no stragglers."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "effort", client, round))
        is_straggler, amount = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if is_straggler >= self.fraction:
            return 1.0
        return 0.0 if self.drop else float(self.least + (1 - self.least) * amount)


class Factors(Component):
    """Each client's share, the same in all rounds.

    Args:
        clients: shares by name.
        default: of all others.
    """

    clients: dict[str, float] = Field(default_factory=dict)
    default: float = Field(default=1.0, ge=0, le=1)

    def share(self, client: str, *, round: int, seed: int) -> float:
        """The client's share, whatever the round."""
        return self.clients.get(client, self.default)
