"""The round loop: pick a cohort, wait for its updates, aggregate, commit. Reads like the algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedmp.aggregate import Aggregator
from fedmp.coordinator.board import Board
from fedmp.coordinator.checkpoint import Checkpoint, CheckpointStore
from fedmp.coordinator.global_model import GlobalModel
from fedmp.coordinator.journal import ClientUpdate, Journal
from fedmp.errors import RoundError
from fedmp.records import DeviceReport, Observer, Progress, RoundFinished, RoundRecord, RoundStarted
from fedmp.strategy import Strategy

__all__ = ["RoundSettings", "make_record", "run_rounds"]

_WATCH_S = 0.2


@dataclass(frozen=True)
class RoundSettings:
    """What the round loop needs to know.

    Attributes:
        num_devices: devices in each client's plan, by client, in client order.
        round_samples: samples that each client processes in one round; 0 while that is not known.
        predicted_s: seconds that each client's round takes by its plan and links; 0 alike.
        first_round, last_round: rounds to run, both included.
        seed: the job's.
        round_timeout_s: a round that takes longer fails.
        fingerprint: of the model's graph, for the checkpoints.
    """

    num_devices: Mapping[str, int]
    round_samples: Mapping[str, int]
    predicted_s: Mapping[str, float]
    first_round: int
    last_round: int
    seed: int
    round_timeout_s: float
    fingerprint: str


def run_rounds(
    settings: RoundSettings,
    *,
    strategy: Strategy,
    aggregator: Aggregator,
    model: GlobalModel,
    board: Board,
    journal: Journal,
    checkpoints: CheckpointStore,
    evaluate: Callable[[], tuple[float | None, float | None]],
    watch: Callable[[], None],
    observe: Observer,
    on_reports: Callable[[int, Mapping[str, Sequence[DeviceReport]]], None],
) -> list[RoundRecord]:
    """Run the rounds of a job.

    Args:
        settings: what to run.
        strategy, aggregator: who takes part, and how updates are combined.
        model: the global model; moved by every round.
        board, journal: shared with the service.
        checkpoints: where each round is committed.
        evaluate: loss and accuracy of the global model on the held-out set.
        watch: called several times a second; raises if the job cannot go on.
        observe: told of starts, progress and ends.
        on_reports: given every committed round's device reports, by client.

    Returns:
        One record a round.

    Raises:
        RoundError: a round did not close in time.
        FedmpError: a device failed.
    """
    records = []
    for round in range(settings.first_round, settings.last_round + 1):
        started_s = time.monotonic()
        bytes_before = (board.bytes_up, board.bytes_down)
        cohort = strategy.cohort(list(settings.num_devices), round=round, seed=settings.seed)
        journal.open(round)
        board.open_round(round, cohort, journal.found({client: board.pushed_by(client) for client in cohort}))
        observe(RoundStarted(round, cohort, sum(settings.round_samples[client] for client in cohort)))
        _wait(board, cohort, settings.round_timeout_s, watch, observe)
        board.close_round()

        updates = {client: _update(journal, client, settings) for client in cohort}
        weights = [float(update.num_examples) for update in updates.values()]
        model.apply(aggregator.combine(list(updates.values()), weights))

        reports = {client: update.reports for client, update in updates.items()}
        record = make_record(round, reports, evaluate()).model_copy(
            update={
                "bytes_up": board.bytes_up - bytes_before[0],
                "bytes_down": board.bytes_down - bytes_before[1],
                "wall_s": time.monotonic() - started_s,
                "simulated_s": max(settings.predicted_s[client] for client in cohort),
            }
        )
        _commit(checkpoints, settings.fingerprint, model, record)
        journal.close()
        on_reports(round, reports)
        observe(RoundFinished(record))
        records.append(record)
    return records


def make_record(
    round: int, reports: Mapping[str, Sequence[DeviceReport]], evaluation: tuple[float | None, float | None]
) -> RoundRecord:
    """A round's row from its device reports and the new global model's loss and accuracy."""
    every = [report for devices in reports.values() for report in devices]
    weight = sum(report.weight for report in every)
    evaluated = sum(report.evaluation_weight for report in every)
    return RoundRecord(
        round=round,
        clients=tuple(reports),
        num_examples=sum(min(report.num_examples for report in devices) for devices in reports.values()),
        train_loss=sum(report.loss_sum for report in every) / weight if weight else 0.0,
        test_loss=evaluation[0],
        test_accuracy=evaluation[1],
        federated_loss=sum(r.evaluation_loss_sum for r in every) / evaluated if evaluated else None,
        federated_accuracy=sum(r.evaluation_correct for r in every) / evaluated if evaluated else None,
        pipeline_bytes=sum(report.pipeline_bytes for report in every),
    )


def _wait(
    board: Board, cohort: Sequence[str], timeout_s: float, watch: Callable[[], None], observe: Observer
) -> None:
    deadline_s = time.monotonic() + timeout_s
    told: dict[str, int] = {}
    while not board.wait_for_cohort(timeout_s=_WATCH_S):
        watch()
        for client, report in board.progress().items():
            if told.get(client) != report.samples_done:
                told[client] = report.samples_done
                observe(
                    Progress(report.round, client, report.samples_done, report.samples_total, report.loss)
                )
        if time.monotonic() > deadline_s:
            raise RoundError(_explain(board, cohort, timeout_s))


def _explain(board: Board, cohort: Sequence[str], timeout_s: float) -> str:
    missing = board.missing()
    silent = [
        f"{client} (stage {', '.join(map(str, stages))}) "
        + (
            f"last heard {heard:.0f} s ago"
            if (heard := board.silent_s(client)) is not None
            else "never heard"
        )
        for client, stages in missing.items()
    ]
    return (
        f"{len(cohort) - len(missing)} of {len(cohort)} clients reported within {timeout_s:g} s, all are "
        f"needed; missing: {'; '.join(silent)}"
    )


def _update(journal: Journal, client: str, settings: RoundSettings) -> ClientUpdate:
    update = journal.update_of(client, settings.num_devices[client])
    assert update is not None
    return update


def _commit(checkpoints: CheckpointStore, fingerprint: str, model: GlobalModel, record: RoundRecord) -> None:
    tensors, values = model.optimizer_state()
    checkpoints.save(
        Checkpoint(record.round, fingerprint, model.state, tensors, values, model.optimizer_name, record)
    )
