"""The clients of a job without plans, as the round loop's `Clients`: all of them finish every round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedmp.client import LocalWork
from fedmp.coordinator import ClientUpdate, Opening, RoundSettings, Trained
from fedmp.engine.at_once import ManyAtOnce, is_mean_by_samples
from fedmp.engine.job import Job
from fedmp.engine.ranked import RankedTrainer
from fedmp.engine.session import Session
from fedmp.engine.simulated_wire import SimulatedWire
from fedmp.engine.traffic import Traffic
from fedmp.engine.unplanned import Unplanned
from fedmp.updates import trained_names

__all__ = ["CohortClients", "Member", "cohort_settings", "local_counts"]


def local_counts(job: Job) -> LocalWork:
    """How much a client does in a round, which no plan changes."""
    return LocalWork(
        optimizer=job.optimizer,
        schedule=job.schedule,
        batch_size=job.batch_size,
        num_microbatches=job.num_microbatches,
        local_epochs=job.strategy.local_epochs,
        local_steps=job.strategy.local_steps,
        seed=job.seed,
        evaluate_first=job.federated_evaluation or job.strategy.needs_losses,
        accumulate_batches=job.accumulate_batches,
        effort=job.strategy.effort,
    )


def cohort_settings(session: Session) -> RoundSettings:
    """What the round loop needs to know of a job without plans."""
    prepared = session.prepared
    assert isinstance(prepared, Unplanned)
    counts = local_counts(prepared.job)
    return RoundSettings(
        clients=tuple(prepared.rows),
        round_samples=_Counted(prepared, counts),
        predicted_s={},
        first_round=session.first_round,
        last_round=prepared.job.rounds,
        seed=prepared.job.seed,
        fingerprint=prepared.fingerprint,
        num_samples=_Sizes(prepared),
        roster=session.roster,
    )


class _Counted(Mapping[str, int]):
    """Samples that each client processes in a round, worked out when asked for."""

    def __init__(self, prepared: Unplanned, counts: LocalWork) -> None:
        self._rows, self._counts = prepared.rows, counts

    def __getitem__(self, name: str) -> int:
        return self._counts.num_examples(self._rows.size(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class _Sizes(Mapping[str, int]):
    """Samples that each client has."""

    def __init__(self, prepared: Unplanned) -> None:
        self._rows = prepared.rows

    def __getitem__(self, name: str) -> int:
        return self._rows.size(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True, eq=False)
class Member:
    """A client without a plan, as a trainer knows it."""

    name: str
    own_rows: torch.Tensor
    work: LocalWork

    def pipeline_bytes(self, num_samples: int) -> int:
        """0."""
        return 0


class CohortClients:
    """Clients that are trained many at once and all finish every round.

    Args:
        session: the job under way.
        trainer: trains them.
    """

    def __init__(self, session: Session, trainer: ManyAtOnce | RankedTrainer) -> None:
        prepared = session.prepared
        assert isinstance(prepared, Unplanned)
        self._prepared, self._job, self._trainer = prepared, prepared.job, trainer
        self._work = local_counts(prepared.job)
        self._keeps = not is_mean_by_samples(prepared.job) or bool(prepared.job.transforms)
        self._pushed = trained_names(prepared.specs.values())
        self._wire = SimulatedWire(session, prepared.specs)
        self._traffic = Traffic(self._wire.uplink, self._wire.downlink)

    def train(self, opening: Opening) -> Trained:
        """Train the cohort.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        rows = self._prepared.rows
        handed_out = self._wire.hand_out(opening.round)
        state = handed_out.tensors
        cohort = [Member(name, rows[name], self._work) for name in opening.cohort]
        updates = self._trainer.train(
            cohort, round=opening.round, states=opening.states, handed_out=state, keep=self._keeps
        )
        sent: Sequence[ClientUpdate] = updates
        if self._job.transforms:
            decoded = [self._wire.send(update, opening.states.get(update.client, "")) for update in updates]
            sent = [update for update, _ in decoded]
            bytes_up = sum(self._traffic.whole_up(payload) for _, payload in decoded)
        else:
            bytes_up = len(updates) * self._traffic.whole_up({name: state[name] for name in self._pushed})
        bytes_down = sum(
            len(names) * self._traffic.whole_down(payload)
            for payload, names in self._wire.payloads(handed_out, opening.cohort)
            if names
        )
        return Trained(updates=sent, bytes_up=bytes_up, bytes_down=bytes_down)

    def unreachable(self) -> frozenset[str]:
        """Nobody."""
        return frozenset()

    def committed(self, round: int) -> None:
        """Nothing was kept."""
