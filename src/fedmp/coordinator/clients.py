"""The clients as the round loop sees them: told what to train, they hand in updates.

Whether they are machines far away (`RemoteClients`) or arithmetic in this process (the simulating engine's),
the loop neither knows nor cares: an `Opening` goes in, `Trained` comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fedmp.aggregate import gives_views
from fedmp.records import DeviceReport

__all__ = ["ClientUpdate", "Clients", "Opening", "Trained"]


@dataclass(frozen=True, eq=False)
class ClientUpdate(Mapping[str, torch.Tensor]):
    """One client's whole update: difference to the global model that it started from, by canonical name.

    Attributes:
        client: who trained it.
        round: the round that it started from.
        tensors: its tensors; may read each from disk when asked, so take them one name at a time.
        reports: what its devices say of it, in order of rank; one where the client is a single process.
    """

    client: str
    round: int
    tensors: Mapping[str, torch.Tensor]
    reports: tuple[DeviceReport, ...]

    @property
    def num_examples(self) -> int:
        """Samples that the client processed: the least of its devices."""
        return min(report.num_examples for report in self.reports)

    @property
    def gives_views(self) -> bool:
        """Whether its tensors are in memory or mapped files, so that aggregators may hold many at once."""
        return gives_views(self.tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True)
class Opening:
    """What a round opens with.

    Attributes:
        round: its number.
        cohort: its clients, in client order.
        minimum: clients that must finish it.
    """

    round: int
    cohort: tuple[str, ...]
    minimum: int


@dataclass(frozen=True, eq=False)
class Trained:
    """What a round's clients did.

    Attributes:
        updates: of the clients that finished, in client order.
        sat_out: clients of the cohort that did not finish, and why.
        bytes_up, bytes_down: bodies sent by and to the devices on the federation plane.
        faults: devices that were lost.
        recoveries: times that a client began the round anew.
        simulated_s: seconds that plans, device speeds and links predict for the round.
    """

    updates: Sequence[ClientUpdate]
    sat_out: Mapping[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    faults: int = 0
    recoveries: int = 0
    simulated_s: float = 0.0


class Clients(Protocol):
    """Those who train."""

    def train(self, opening: Opening) -> Trained:
        """Train one round from the present global model; returns once the round is closed.

        Raises:
            RoundError: fewer than the minimum will finish it, or did in time.
            FedmpError: a client cannot go on, and nothing can be done about it.
        """
        ...

    def committed(self, round: int) -> None:
        """The round's result is safe: what was kept for the case that it must be made again may go."""
        ...
