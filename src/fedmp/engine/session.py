"""What an engine is given to run the rounds of a job, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedmp.coordinator import CheckpointStore, GlobalModel
from fedmp.engine.prepare import Prepared
from fedmp.pipeline import BatchResult, MicroBatches, StageRunner
from fedmp.records import Observer, RoundRecord, TimedAction
from fedmp.stages import Stage

__all__ = ["Outcome", "Session", "evaluator"]

_EVALUATION_BATCH = 500


@dataclass(frozen=True, eq=False)
class Session:
    """A job under way.

    Attributes:
        prepared: the job with its plans and data.
        model: the global model, as the last committed round left it.
        checkpoints: where rounds are committed.
        journal_folder: for the coordinator's journal.
        first_round: the round to begin with.
        started_s: `time.monotonic()` when the run began.
        observe: told of everything.
    """

    prepared: Prepared
    model: GlobalModel
    checkpoints: CheckpointStore
    journal_folder: Path
    first_round: int
    started_s: float = field(default_factory=time.monotonic)
    observe: Observer = lambda event: None


@dataclass(frozen=True)
class Outcome:
    """What an engine returns.

    Attributes:
        records: one a round.
        startup_s: seconds until the first round could begin.
        timelines: one measured pipeline step of each client that was measured, by name.
    """

    records: tuple[RoundRecord, ...]
    startup_s: float
    timelines: Mapping[str, tuple[TimedAction, ...]] = field(default_factory=dict)


def evaluator(session: Session) -> Callable[[], tuple[float, float | None]]:
    """A function that gives the global model's mean loss and accuracy (if any) on the held-out set."""
    prepared = session.prepared
    test = prepared.data.test
    stage = Stage(prepared.whole_stage(), session.model.state)
    runner = StageRunner(stage, prepared.job.task)

    def evaluate() -> tuple[float, float | None]:
        total = BatchResult()
        for indices in torch.arange(len(test)).split(_EVALUATION_BATCH):
            inputs, targets = test.batch(indices)
            batch = MicroBatches([len(indices)], [(inputs,)], [targets])
            total = total + runner.evaluate_batch(batch, round=0, step=0)
        weight = max(total.weight, 1.0)
        return total.loss_sum / weight, total.num_correct / weight if prepared.job.task.has_accuracy else None

    return evaluate
