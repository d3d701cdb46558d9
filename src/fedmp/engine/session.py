"""What an engine is given to run the rounds of a job, and what it gives back."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fedmp.client import StateStore
from fedmp.coordinator import (
    CheckpointStore,
    Clients,
    ClientUpdate,
    GlobalModel,
    Journal,
    Roster,
    RoundSettings,
    run_rounds,
)
from fedmp.data import Dataset
from fedmp.engine.attacked import AttackedClients
from fedmp.engine.population import MANY_CLIENTS, Population, Told
from fedmp.engine.prepare import Prepared
from fedmp.engine.ranks import Ranks
from fedmp.engine.setup import ClientSetup
from fedmp.errors import RoundError
from fedmp.pipeline import BatchResult, MicroBatches, StageRunner
from fedmp.records import Observer, RoundRecord, TimedAction
from fedmp.stages import Stage
from fedmp.tasks import Task

__all__ = [
    "Outcome",
    "Session",
    "Timelines",
    "evaluator",
    "make_journal",
    "plain_evaluation",
    "round_settings",
    "run_session",
]

_EVALUATION_BATCH = 500

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Session:
    """A job under way.

    Attributes:
        prepared: the job with its plans and data.
        model: the global model, as the last committed round left it.
        checkpoints: where rounds are committed.
        journal_folder: for the coordinator's journal.
        state_folder: for what simulated clients, or devices of this machine, keep from round to round.
        first_round: the round to begin with.
        late: clients that go on with an earlier round, as the run before left them.
        roster: what the coordinator remembers of the clients.
        ranks: the processes that simulate the job together; None for one by itself.
        started_s: `time.monotonic()` when the run began.
        simulated_s: seconds on the clock of the simulation, of the rounds before the first.
        observe: told of everything.
        config: as the command line composed it; empty where there was none.
    """

    prepared: Prepared
    model: GlobalModel
    checkpoints: CheckpointStore
    journal_folder: Path
    state_folder: Path
    first_round: int
    started_s: float = field(default_factory=time.monotonic)
    simulated_s: float = 0.0
    observe: Observer = lambda event: None
    config: Mapping[str, Any] = field(default_factory=dict)
    late: Mapping[str, int] = field(default_factory=dict)
    roster: Roster = field(default_factory=dict)
    ranks: Ranks | None = None


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


class Timelines:
    """Measured steps, as they arrive with the devices' reports."""

    def __init__(self) -> None:
        self.by_client: dict[str, tuple[TimedAction, ...]] = {}

    def keep(self, updates: Sequence[ClientUpdate]) -> None:
        """Take those of a round."""
        for update in updates:
            actions = [TimedAction(*row) for report in update.reports for row in report.timeline]
            if actions:
                self.by_client[update.client] = _from_zero(actions)


def run_session(
    session: Session, settings: RoundSettings, clients: Clients, timelines: Timelines | None = None
) -> tuple[RoundRecord, ...]:
    """Run a job's rounds with whatever clients an engine has.

    Raises:
        RoundError: a round could not be closed, or not be written to disk.
        FedmpError: as the clients do.
    """
    job = session.prepared.job
    if job.attack is not None:
        clients = AttackedClients(clients, job.attack, settings.clients, job.seed)
    try:
        records = run_rounds(
            settings,
            strategy=job.strategy,
            aggregator=job.aggregator,
            model=session.model,
            clients=clients,
            checkpoints=session.checkpoints,
            evaluate=evaluator(session),
            observe=session.observe,
            on_updates=timelines.keep if timelines is not None else lambda _: None,
        )
    except OSError as error:
        raise RoundError(
            f"cannot write to {session.journal_folder.parent}: {error.strerror or error}. What was committed is "
            f"safe: make room and resume the run"
        ) from error
    return tuple(records)


def make_journal(session: Session) -> Journal:
    """The coordinator's journal, which knows how the job's updates and global stages travel."""
    specs, job = session.prepared.graph.state, session.prepared.job
    return Journal(
        session.journal_folder,
        specs,
        uplink=job.uplink_channel(specs),
        downlink=job.downlink_channel(specs),
        estimates=StateStore(session.journal_folder / "held"),
    )


def round_settings(session: Session) -> RoundSettings:
    """What the coordinator's round loop needs to know of a job."""
    prepared = session.prepared
    clients = prepared.clients
    num_samples = _attribute(clients, "num_samples")
    round_samples = _attribute(clients, "round_samples")
    names: Sequence[str] = ()
    if isinstance(clients, Population):  # there may be 100,000
        names, num_samples, round_samples = clients.names, clients.num_samples, clients.round_samples
    return RoundSettings(
        clients=names or tuple(clients),
        round_samples=_of_each(clients, round_samples),
        predicted_s=_of_each(clients, lambda name: clients[name].predicted_s),
        first_round=session.first_round,
        last_round=prepared.job.rounds,
        seed=prepared.job.seed,
        evaluate_every=prepared.job.evaluate_every,
        fingerprint=prepared.fingerprint,
        late=session.late,
        num_samples=_of_each(clients, num_samples),
        roster=session.roster,
    )


def _attribute(clients: Mapping[str, ClientSetup], name: str) -> Callable[[str], int]:
    return lambda client: int(getattr(clients[client], name))


def _of_each(clients: Mapping[str, ClientSetup], tell: Callable[[str], T]) -> Mapping[str, T]:
    """Something of each client; of a large population when it is asked for."""
    if len(clients) > MANY_CLIENTS:
        return Told(clients, tell)
    return {name: tell(name) for name in clients}


def evaluator(session: Session) -> Callable[[], tuple[float | None, float | None]]:
    """A function that gives the global model's mean loss and accuracy on the held-out set, where there is one."""
    prepared = session.prepared
    test = prepared.data.test
    if len(test) == 0:
        return lambda: (None, None)
    if not prepared.is_traced:
        return _plain_evaluator(session)
    stage = Stage(prepared.whole_stage(), session.model.state)
    runner = StageRunner(stage, prepared.job.task)

    def evaluate() -> tuple[float | None, float | None]:
        total = BatchResult()
        for indices in torch.arange(len(test)).split(_EVALUATION_BATCH):
            inputs, targets = test.batch(indices)
            batch = MicroBatches([len(indices)], [(inputs,)], [targets])
            total = total + runner.evaluate_batch(batch, round=0, step=0)
        weight = max(total.weight, 1.0)
        return total.loss_sum / weight, total.num_correct / weight if prepared.job.task.has_accuracy else None

    return evaluate


def plain_evaluation(
    model: nn.Module, state: Mapping[str, torch.Tensor], task: Task
) -> Callable[[Dataset, torch.Tensor], tuple[float, float, float]]:
    """A function that gives a model's summed loss, weight and correct predictions on rows of a data set.

    Args:
        model: not traced; it is not changed.
        state: its weights, as they are when the function is called.
        task: the loss.
    """
    memo = {id(tensor): state[name] for name, tensor in model.named_buffers()}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(state[name], requires_grad=False)
    module = copy.deepcopy(model, memo).eval()

    def evaluate(dataset: Dataset, rows: torch.Tensor) -> tuple[float, float, float]:
        loss = weight = correct = 0.0
        with torch.no_grad():
            for indices in rows.split(_EVALUATION_BATCH):
                inputs, targets = dataset.batch(indices)
                output = module(inputs)
                loss += float(task.loss_sum(output, targets))
                weight += task.weight(targets)
                correct += task.num_correct(output, targets)
        return loss, weight, correct

    return evaluate


def _plain_evaluator(session: Session) -> Callable[[], tuple[float | None, float | None]]:
    """The same as `evaluator`, by the model's own forward."""
    prepared = session.prepared
    task, test = prepared.job.task, prepared.data.test
    evaluate_rows = plain_evaluation(prepared.model, session.model.state, task)
    everything = torch.arange(len(test))

    def evaluate() -> tuple[float | None, float | None]:
        loss, weight, correct = evaluate_rows(test, everything)
        return loss / max(weight, 1.0), correct / max(weight, 1.0) if task.has_accuracy else None

    return evaluate


def _from_zero(timeline: Sequence[TimedAction]) -> tuple[TimedAction, ...]:
    first_s = min((action.start_s for action in timeline), default=0.0)
    return tuple(
        TimedAction(a.device, a.stage, a.kind, a.microbatch, a.start_s - first_s, a.stop_s - first_s)
        for a in timeline
    )
