"""The round loop of every engine: pick a cohort, let it train, aggregate, commit. Reads like the algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedmp.aggregate import Aggregator
from fedmp.coordinator.checkpoint import Checkpoint, CheckpointStore
from fedmp.coordinator.clients import Clients, Opening, Trained
from fedmp.coordinator.global_model import GlobalModel
from fedmp.records import DeviceReport, Observer, RoundFinished, RoundRecord, RoundStarted
from fedmp.strategy import Strategy

__all__ = ["RoundSettings", "run_rounds"]

Evaluation = tuple[float | None, float | None]


@dataclass(frozen=True)
class RoundSettings:
    """What the round loop needs to know.

    Attributes:
        clients: in client order.
        round_samples: samples that each client processes in one round; 0 while that is not known.
        predicted_s: seconds that each client's round takes by its plan and links; 0 alike.
        first_round, last_round: rounds to run, both included.
        seed: the job's.
        fingerprint: of the model's graph, for the checkpoints.
    """

    clients: Sequence[str]
    round_samples: Mapping[str, int]
    predicted_s: Mapping[str, float]
    first_round: int
    last_round: int
    seed: int
    fingerprint: str


def run_rounds(
    settings: RoundSettings,
    *,
    strategy: Strategy,
    aggregator: Aggregator,
    model: GlobalModel,
    clients: Clients,
    checkpoints: CheckpointStore,
    evaluate: Callable[[], Evaluation],
    observe: Observer,
    on_reports: Callable[[int, Mapping[str, Sequence[DeviceReport]]], None] = lambda *_: None,
) -> list[RoundRecord]:
    """Run the rounds of a job.

    Args:
        settings: what to run.
        strategy, aggregator: who takes part, and how updates are combined.
        model: the global model; moved by every round.
        clients: those who train.
        checkpoints: where each round is committed.
        evaluate: loss and accuracy of the global model on the held-out set.
        observe: told of starts and ends.
        on_reports: given every committed round's device reports, by client.

    Returns:
        One record a round.

    Raises:
        RoundError: a round did not close in time.
        FedmpError: a client cannot go on.
    """
    records = []
    for round in range(settings.first_round, settings.last_round + 1):
        started_s = time.monotonic()
        opening = _open(settings, strategy, round)
        num_samples = sum(settings.round_samples[client] for client in opening.cohort)
        observe(RoundStarted(round, opening.cohort, num_samples))

        trained = clients.train(opening)
        weights = [float(update.num_examples) for update in trained.updates]
        model.apply(aggregator.combine(trained.updates, weights))

        record = _record(round, trained, evaluate(), started_s)
        _commit(checkpoints, settings.fingerprint, model, record)
        clients.committed(round)
        on_reports(round, {update.client: update.reports for update in trained.updates})
        observe(RoundFinished(record))
        records.append(record)
    return records


def _open(settings: RoundSettings, strategy: Strategy, round: int) -> Opening:
    cohort = strategy.cohort(settings.clients, round=round, seed=settings.seed)
    minimum = len(cohort) if strategy.min_clients is None else min(strategy.min_clients, len(cohort))
    return Opening(round, cohort, minimum)


def _record(round: int, trained: Trained, evaluation: Evaluation, started_s: float) -> RoundRecord:
    """A round's row from its device reports and the new global model's loss and accuracy."""
    reports = [report for update in trained.updates for report in update.reports]
    weight = sum(report.weight for report in reports)
    evaluated = sum(report.evaluation_weight for report in reports)
    return RoundRecord(
        round=round,
        clients=tuple(update.client for update in trained.updates),
        num_examples=sum(update.num_examples for update in trained.updates),
        train_loss=sum(report.loss_sum for report in reports) / weight if weight else 0.0,
        test_loss=evaluation[0],
        test_accuracy=evaluation[1],
        federated_loss=sum(r.evaluation_loss_sum for r in reports) / evaluated if evaluated else None,
        federated_accuracy=sum(r.evaluation_correct for r in reports) / evaluated if evaluated else None,
        bytes_up=trained.bytes_up,
        bytes_down=trained.bytes_down,
        pipeline_bytes=sum(report.pipeline_bytes for report in reports),
        wall_s=time.monotonic() - started_s,
        simulated_s=trained.simulated_s,
        faults=trained.faults,
        recoveries=trained.recoveries,
        sat_out=tuple(trained.sat_out),
    )


def _commit(checkpoints: CheckpointStore, fingerprint: str, model: GlobalModel, record: RoundRecord) -> None:
    tensors, values = model.optimizer_state()
    checkpoints.save(
        Checkpoint(record.round, fingerprint, model.state, tensors, values, model.optimizer_name, record)
    )
