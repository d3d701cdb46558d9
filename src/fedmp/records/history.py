"""What a run leaves behind and what an observer of a run is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from fedmp.records.clock import RoundTimed
from fedmp.records.plan import Plan

__all__ = [
    "ClientData",
    "Event",
    "Note",
    "Observer",
    "Progress",
    "RoundFinished",
    "RoundRecord",
    "RoundStarted",
    "RunFinished",
    "RunStarted",
    "Summary",
    "TimedAction",
]


class RoundRecord(BaseModel):
    """One row of `metrics.jsonl`: a committed round.

    Attributes:
        round: counted from 1.
        clients: names of the clients whose updates were aggregated.
        num_examples: samples processed in local training by those clients.
        train_loss: mean loss over the samples processed, before each step's update.
        test_loss, test_accuracy: of the new global model on the held-out set; accuracy from 0 to 1.
        federated_loss, federated_accuracy: sample-weighted over the clients' own data through their
            pipelines, of the round's starting model; None where it was not asked for.
        bytes_up, bytes_down: bodies sent by and to the devices on the federation plane.
        pipeline_bytes: bytes sent between the devices of all clients.
        wall_s: seconds of the round on this machine's clock.
        simulated_s: seconds that the plans, device speeds and links predict for it.
        faults: devices that were lost.
        recoveries: times that a client began the round anew.
        sat_out: clients that took part and whose updates count in no round: they failed, or were late and the
            strategy discards that.
        late: clients that the round did not wait for and that train on, by the round from whose model they began.
        stale: clients among `clients` that began with an earlier round: which.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    clients: tuple[str, ...]
    num_examples: int
    train_loss: float
    test_loss: float | None = None
    test_accuracy: float | None = None
    federated_loss: float | None = None
    federated_accuracy: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    pipeline_bytes: int = 0
    wall_s: float = 0.0
    simulated_s: float = 0.0
    faults: int = 0
    recoveries: int = 0
    sat_out: tuple[str, ...] = ()
    late: Mapping[str, int] = Field(default_factory=dict)
    stale: Mapping[str, int] = Field(default_factory=dict)


class Summary(BaseModel):
    """`summary.json`: a run in one record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    rounds: int
    clients: int
    devices: int
    num_parameters: int
    final_accuracy: float | None
    centralized_accuracy: float | None = None
    accuracy_gap_points: float | None = None
    samples_processed: int = 0
    centralized_samples: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    pipeline_bytes: int = 0
    centralized_bytes: int | None = None
    wall_s: float = 0.0
    simulated_s: float = 0.0
    centralized_wall_s: float | None = None
    startup_s: float = 0.0
    faults: int = 0
    recoveries: int = 0


@dataclass(frozen=True)
class ClientData:
    """One client's row in the table of who holds what.

    Attributes:
        name: the client.
        num_samples: its training samples.
        label_counts: samples by label, in label order; empty where targets are not classes.
    """

    name: str
    num_samples: int
    label_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class TimedAction:
    """One measured action of one pipelined step, for the time line.

    Attributes:
        device: name of the device that ran it.
        stage: its stage.
        kind: "forward", "backward", "send", "wait" (for a peer), "exchange" (tied gradients, norms) or
            "step" (optimizer).
        microbatch: which micro-batch, or -1.
        start_s, stop_s: seconds on a clock that the devices of one machine share.
    """

    device: str
    stage: int
    kind: str
    microbatch: int
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class RunStarted:
    """Everything is ready; training is about to begin. `plans` is by client name."""

    title: str
    engine: str
    num_rounds: int
    first_round: int
    plans: Mapping[str, Plan]
    data: tuple[ClientData, ...]
    label_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class RoundStarted:
    """A round began with this cohort; `num_samples` is what the cohort will process in all."""

    round: int
    clients: tuple[str, ...]
    num_samples: int


@dataclass(frozen=True)
class Progress:
    """A client has processed so many samples of its round, at this mean loss so far."""

    round: int
    client: str
    samples_done: int
    samples_total: int
    loss: float


@dataclass(frozen=True)
class RoundFinished:
    """A round was committed."""

    record: RoundRecord


@dataclass(frozen=True)
class Note:
    """Something worth telling: a phase that began, a warning, a recovery."""

    message: str


@dataclass(frozen=True)
class RunFinished:
    """The run is over; `run_dir` holds its files, `timeline` one measured pipeline step."""

    summary: Summary
    records: tuple[RoundRecord, ...]
    run_dir: str
    timeline: tuple[TimedAction, ...] = field(default=())


Event: TypeAlias = RunStarted | RoundStarted | Progress | RoundTimed | RoundFinished | Note | RunFinished


class Observer(Protocol):
    """Whoever watches a run: a live view, a log, a test."""

    def __call__(self, event: Event) -> None:
        """Take one event; must return quickly and never raise."""
        ...
