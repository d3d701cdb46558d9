"""The clients as the round loop sees them: told what to train, they hand in updates.

Whether they are machines far away (`RemoteClients`) or arithmetic in this process (the simulating engine's),
the loop neither knows nor cares: an `Opening` goes in, `Trained` comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from fedmp.aggregate import gives_views
from fedmp.records import DeviceReport
from fedmp.strategy import Closing, Contribution

__all__ = ["ClientUpdate", "Clients", "Opening", "Trained"]


_SMALLEST_RATE = 1e-30  # of a client whose rate is 0


@dataclass(frozen=True, eq=False)
class ClientUpdate(Contribution):
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

    @property
    def num_samples(self) -> int:
        """Samples that the client has."""
        return max(report.num_samples for report in self.reports)

    @property
    def num_steps(self) -> int:
        """Optimizer steps that the client made."""
        return max(report.num_steps for report in self.reports)

    @property
    def rate_sum(self) -> float:
        """The sum of the coefficients of its gradients; a device that trains nothing reports none."""
        return max(_SMALLEST_RATE, *(report.rate_sum for report in self.reports))

    @property
    def start_loss(self) -> float | None:
        """Mean loss of the round's starting model on its data; None where that was not asked for."""
        weight = self.evaluation_weight
        return self.evaluation_loss_sum / weight if weight else None

    @property
    def loss(self) -> float | None:
        """Mean loss of the starting model, or else over its local training; None if it told neither."""
        start_loss, weight = self.start_loss, self.weight
        if start_loss is not None:
            return start_loss
        return self.loss_sum / weight if weight else None

    @property
    def generation(self) -> str:
        """Of the pipeline that made it; empty for a client of one process."""
        return self.reports[0].generation

    @property
    def loss_sum(self) -> float:
        """Over local training."""
        return sum(report.loss_sum for report in self.reports)

    @property
    def weight(self) -> float:
        """Of the losses over local training."""
        return sum(report.weight for report in self.reports)

    @property
    def evaluation_loss_sum(self) -> float:
        """Of the round's starting model on its data."""
        return sum(report.evaluation_loss_sum for report in self.reports)

    @property
    def evaluation_weight(self) -> float:
        """Of these losses; 0 where they were not asked for."""
        return sum(report.evaluation_weight for report in self.reports)

    @property
    def evaluation_correct(self) -> float:
        """Correct predictions of the starting model on its data."""
        return sum(report.evaluation_correct for report in self.reports)

    @property
    def pipeline_bytes(self) -> int:
        """Bytes between its devices."""
        return sum(report.pipeline_bytes for report in self.reports)

    def discounted(self, factor: float) -> ClientUpdate:
        """The same update, its floating-point tensors multiplied by a factor when they are asked for."""
        return self if factor == 1 else replace(self, tensors=_Discounted(self.tensors, factor))

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
        cohort: clients that begin with its model, in client order.
        closing: when it closes.
        late: clients that go on with an earlier round: which.
        spare: clients that begin one by one, in this order, as others are done.
        states: names what each client kept of its last update that counted; it starts from that.
    """

    round: int
    cohort: tuple[str, ...]
    closing: Closing
    late: Mapping[str, int] = field(default_factory=dict)
    spare: tuple[str, ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_clients(self) -> int:
        """All who may take part."""
        return len(self.cohort) + len(self.late) + len(self.spare)

    def begun(self, client: str) -> int:
        """The round from whose model a client trains."""
        return self.late.get(client, self.round)


@dataclass(frozen=True, eq=False)
class Trained:
    """What a round's clients did.

    Attributes:
        updates: those that the round takes, in client order; at most one of a client.
        late: clients whose updates may count in a later round: the round from which they started.
        sat_out: clients that took part, but whose updates count in no round, and why.
        bytes_up, bytes_down: bodies sent by and to the devices on the federation plane.
        faults: devices that were lost.
        recoveries: times that a client began the round anew.
        simulated_s: seconds that plans, device speeds and links predict for the round.
    """

    updates: Sequence[ClientUpdate]
    late: Mapping[str, int] = field(default_factory=dict)
    sat_out: Mapping[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    faults: int = 0
    recoveries: int = 0
    simulated_s: float = 0.0


@dataclass(frozen=True, eq=False)
class _Discounted(Mapping[str, torch.Tensor]):
    tensors: Mapping[str, torch.Tensor]
    factor: float

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor * self.factor if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Clients(Protocol):
    """Those who train."""

    def train(self, opening: Opening) -> Trained:
        """Train one round from the present global model; returns once the round is closed.

        Raises:
            RoundError: fewer than the minimum will finish it, or did in time.
            FedmpError: a client cannot go on, and nothing can be done about it.
        """
        ...

    def unreachable(self) -> frozenset[str]:
        """Clients that could not take part now; they may still be asked to."""
        ...

    def committed(self, round: int) -> None:
        """The round's result is safe: what was kept for the case that it must be made again may go."""
        ...
