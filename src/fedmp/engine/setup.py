"""One client of a job, ready to train: its plan, its work, its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fedmp.client import LocalWork
from fedmp.clock import ClientWork, DeviceWork, ideal_round_s
from fedmp.data import Dataset
from fedmp.graph import StateSpec
from fedmp.records import Plan
from fedmp.stages import StageBlueprint
from fedmp.strategy import received_name
from fedmp.topology import Client
from fedmp.updates import trained_names

__all__ = ["ClientSetup", "Piece", "received_names", "shared_names"]


class Piece(Protocol):
    """What a stage holds; a blueprint says how it computes as well."""

    @property
    def state(self) -> Mapping[str, StateSpec]:
        """The tensors that it needs, by canonical name."""
        ...

    @property
    def owned(self) -> tuple[str, ...]:
        """Names of those that it answers for."""
        ...


@dataclass(frozen=True, eq=False)
class ClientSetup:
    """One client, ready to train.

    Attributes:
        client: from the topology.
        plan: how the model is cut over its devices.
        pieces: what each stage holds: blueprints, where the model was traced.
        moved: what each device pulls and pushes in a round.
        work: what it does in a round, by its plan's schedule.
        data: everyone's training samples; None where the client's are elsewhere.
        rows: which of them are its own; None alike.
        num_samples: that it has; 0 while that is not known.
    """

    client: Client
    plan: Plan
    pieces: Sequence[Piece]
    moved: tuple[DeviceWork, ...]
    work: LocalWork
    data: Dataset | None
    rows: torch.Tensor | None
    num_samples: int = 0

    @property
    def name(self) -> str:
        """The client's name."""
        return self.client.name

    @property
    def own_rows(self) -> torch.Tensor:
        """Its rows of everyone's samples, which must be here."""
        assert self.rows is not None
        return self.rows

    @property
    def blueprints(self) -> Sequence[StageBlueprint]:
        """Its stages; the model must have been traced."""
        blueprints = [piece for piece in self.pieces if isinstance(piece, StageBlueprint)]
        assert len(blueprints) == len(self.pieces)
        return blueprints

    @property
    def round_samples(self) -> int:
        """Samples that it processes in one round; 0 while that is not known."""
        return self.work.num_examples(self.num_samples) if self.num_samples else 0

    @property
    def predicted_s(self) -> float:
        """Seconds of one round by its plan, its links and its samples; 0 alike."""
        return ideal_round_s(self.round_work(self.num_samples)) if self.num_samples else 0.0

    @property
    def own_samples(self) -> Dataset:
        """A copy of its training samples, which must be here."""
        assert self.data is not None
        return self.data.select(self.own_rows)

    def shared(self, piece: Piece) -> tuple[str, ...]:
        """The trained tensors of a stage that its updates hold, all in each round or some in turn."""
        return shared_names(self.work, piece)

    def received(self, pieces: Sequence[Piece]) -> tuple[str, ...]:
        """Names of the server's slots that come with the stages."""
        return received_names(self.work, pieces)

    def examples_in(self, round: int) -> int:
        """Samples that it processes in one round."""
        return self.work.of_round(self.name, round).num_examples(len(self.own_rows))

    def pipeline_bytes(self, num_samples: int) -> int:
        """Bytes of boundary tensors between its devices, there and back, for so many samples."""
        if len(self.plan.stages) == 1:
            return 0
        per_sample = sum(stage.boundary_bytes for stage in self.plan.stages) / self.plan.microbatch_size
        return int(2 * per_sample * num_samples)

    def with_samples(self, num_samples: int) -> ClientSetup:
        """The same client, now that it is known how many samples it has."""
        return replace(self, num_samples=num_samples)

    def round_work(self, num_samples: int, *, round: int | None = None) -> ClientWork:
        """What a round is to the clock, with so many samples; None for one with all of the work."""
        work = self.work if round is None else self.work.of_round(self.name, round)
        return self.clock_work(work.num_batches(num_samples))

    def clock_work(self, num_batches: int) -> ClientWork:
        """What so many batches are to the clock."""
        return ClientWork(self.name, self.client.uplink, self.plan, num_batches, self.moved)


def shared_names(work: LocalWork, piece: Piece) -> tuple[str, ...]:
    """The trained tensors of a stage that updates hold."""
    names = trained_names([piece.state[name] for name in piece.owned])
    return tuple(name for name in names if name not in work.scope.own)


def received_names(work: LocalWork, pieces: Sequence[Piece]) -> tuple[str, ...]:
    """Names of the server's slots that come with some stages."""
    slots = work.rule.received if work.rule else ()
    names = {
        name: None
        for piece in pieces
        for name, spec in piece.state.items()
        if spec.kind == "parameter" and spec.requires_grad and name not in work.scope.own
    }
    return tuple(received_name(slot, name) for slot in slots for name in names)
