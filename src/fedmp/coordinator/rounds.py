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
from fedmp.records import DeviceReport, Note, Observer, Progress, RoundFinished, RoundRecord, RoundStarted
from fedmp.strategy import Strategy

__all__ = ["RoundSettings", "make_record", "run_rounds"]

_WATCH_S = 0.05


@dataclass(frozen=True)
class RoundSettings:
    """What the round loop needs to know.

    Attributes:
        clients: in client order.
        round_samples: samples that each client processes in one round; 0 while that is not known.
        predicted_s: seconds that each client's round takes by its plan and links; 0 alike.
        first_round, last_round: rounds to run, both included.
        seed: the job's.
        round_timeout_s: a round that takes longer fails.
        fingerprint: of the model's graph, for the checkpoints.
    """

    clients: Sequence[str]
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
        before = (board.bytes_up, board.bytes_down, board.faults, board.recoveries)
        cohort = strategy.cohort(settings.clients, round=round, seed=settings.seed)
        journal.open(round)
        board.open_round(round, cohort, journal.found({client: board.pushed_by(client) for client in cohort}))
        observe(RoundStarted(round, cohort, sum(settings.round_samples[client] for client in cohort)))
        finished = _wait(board, cohort, strategy.min_clients, settings.round_timeout_s, watch, observe)
        board.close_round()

        updates = {client: _update(journal, client, len(board.pushed_by(client))) for client in finished}
        weights = [float(update.num_examples) for update in updates.values()]
        model.apply(aggregator.combine(list(updates.values()), weights))

        reports = {client: update.reports for client, update in updates.items()}
        record = make_record(round, reports, evaluate()).model_copy(
            update={
                "bytes_up": board.bytes_up - before[0],
                "bytes_down": board.bytes_down - before[1],
                "faults": board.faults - before[2],
                "recoveries": board.recoveries - before[3],
                "sat_out": tuple(client for client in cohort if client not in finished),
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
    board: Board,
    cohort: Sequence[str],
    min_clients: int | None,
    timeout_s: float,
    watch: Callable[[], None],
    observe: Observer,
) -> tuple[str, ...]:
    """Wait for the cohort; returns the clients that finished the round.

    Raises:
        RoundError: too few will, or did in time.
    """
    minimum = len(cohort) if min_clients is None else min(min_clients, len(cohort))
    deadline_s = time.monotonic() + timeout_s
    told: dict[str, int] = {}
    while True:
        is_closed = board.wait_for_cohort(timeout_s=_WATCH_S)
        if not is_closed:
            watch()
        for incident in board.incidents():
            observe(Note(incident))
        for client, report in board.progress().items():
            if told.get(client) != report.samples_done:
                told[client] = report.samples_done
                observe(
                    Progress(report.round, client, report.samples_done, report.samples_total, report.loss)
                )
        given_up, finished = board.given_up(), board.finished()
        if len(cohort) - len(given_up) < minimum:
            why = "; ".join(f"{client}: {reason}" for client, reason in given_up.items())
            raise RoundError(
                f"{len(cohort) - len(given_up)} of {len(cohort)} clients are left in the round, "
                f"{_needed(minimum, cohort)}; {why}. What was committed is safe: mend it and resume the run"
            )
        is_late = time.monotonic() > deadline_s
        if is_late and len(finished) < minimum:
            raise RoundError(_explain(board, cohort, minimum, timeout_s))
        if is_late or (is_closed and len(finished) >= minimum):
            return finished


def _needed(minimum: int, cohort: Sequence[str]) -> str:
    return "all are needed" if minimum == len(cohort) else f"{minimum} are needed"


def _explain(board: Board, cohort: Sequence[str], minimum: int, timeout_s: float) -> str:
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
        f"{len(board.finished())} of {len(cohort)} clients reported within {timeout_s:g} s, "
        f"{_needed(minimum, cohort)}; missing: {'; '.join(silent)}"
    )


def _update(journal: Journal, client: str, num_devices: int) -> ClientUpdate:
    update = journal.update_of(client, num_devices)
    assert update is not None
    return update


def _commit(checkpoints: CheckpointStore, fingerprint: str, model: GlobalModel, record: RoundRecord) -> None:
    tensors, values = model.optimizer_state()
    checkpoints.save(
        Checkpoint(record.round, fingerprint, model.state, tensors, values, model.optimizer_name, record)
    )
