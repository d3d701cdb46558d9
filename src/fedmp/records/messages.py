"""Control messages of the federation plane: plain data between a device and the coordinator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedmp.records.plan import Plan

__all__ = [
    "Address",
    "DeviceReport",
    "FailureReport",
    "Instruction",
    "JobOffer",
    "Joined",
    "ProgressReport",
    "Ready",
    "Receipt",
    "TimedActionRow",
    "round_of_key",
    "state_key",
]


def state_key(round: int, generation: str = "") -> str:
    """Names the state that a client's update left with it.

    Args:
        round: that the update started from.
        generation: of the pipeline that made it; empty for a client of one process.
    """
    return f"{round:05d}-{generation}" if generation else f"{round:05d}"


def round_of_key(key: str) -> int:
    """The round of a state; 0 for no state."""
    return int(key.split("-", 1)[0]) if key else 0


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


class Instruction(_Message):
    """What a device should do next.

    Attributes:
        kind: "train" a round; "wait" and ask again; "join", say what you hold: the coordinator was started anew
            and does not know you, or your client's model was cut anew and you hold a stage of another plan;
            "next", the job is over and another one follows; "stop", all is over.
        round: the round to train.
        generation: of the client's pipeline in which to train it; a device that has met its peers in an
            earlier one meets them anew.
        attempt: which attempt of the client at this round.
        state: names what the client kept of an earlier round, from which it starts; empty for nothing.
        reason: why to wait or stop, for people.
        plan: digest of the plan in which to join; a device that holds another one asks for the job again.
    """

    kind: Literal["train", "wait", "join", "next", "stop"]
    round: int = 0
    generation: int = Field(default=0, ge=0)
    attempt: int = Field(default=1, ge=1)
    state: str = Field(default="", max_length=64, pattern=r"^[0-9A-Za-z-]*$")
    reason: str = ""
    plan: str = ""


class Address(_Message):
    """Where the devices of a client find their first device.

    Attributes:
        host, port: of its rendezvous.
        secret: known to the client's devices alone, and new in each generation.
        number: of the generation that comes together here.
    """

    host: str
    port: int = Field(gt=0, lt=65536)
    secret: str = ""
    number: int = Field(default=0, ge=0, le=2**31)

    @property
    def generation(self) -> str:
        """A name of the pipeline that comes together here; does not tell the secret."""
        return hashlib.sha256(f"generation {self.secret}".encode()).hexdigest()[:16]


class JobOffer(_Message):
    """What a device needs to know of a job beyond its own config; plain data, nothing to execute.

    Attributes:
        job: equal for equal jobs.
        client, device: who the asking device is.
        client_index, num_clients: the client's place in the topology, for a split of common data.
        plan: how the client's model is cut over its devices.
        fingerprint: of the coordinator's traced model.
        agreed: digests of the config's values on which all must agree, by key.
        sample_shape, sample_dtype: of one model input.
        record_timeline: measure one step in the first round.
        versions: of the coordinator's libraries, by name.
        heartbeat_s: how often the device should tell that it is alive.
    """

    job: str
    client: str
    device: str
    client_index: int = Field(ge=0)
    num_clients: int = Field(ge=1)
    plan: Plan
    fingerprint: str
    agreed: Mapping[str, str]
    sample_shape: tuple[int, ...]
    sample_dtype: str
    record_timeline: bool = False
    versions: Mapping[str, str] = Field(default_factory=dict)
    heartbeat_s: float = Field(default=5.0, gt=0)


class Ready(_Message):
    """A device says that it can begin.

    Attributes:
        job: the job that it is ready for.
        num_samples: of its client; None if it holds no data.
        plan: digest of the plan that it holds its stages of.
        process: names its process, as in its requests for instructions.
        unable: why it cannot take its place in the plan, if it cannot: its client is planned without it.
    """

    job: str
    num_samples: int | None = Field(default=None, ge=1, le=2**53)
    plan: str = Field(default="", max_length=64)
    process: str = Field(default="", max_length=64)
    unable: str = Field(default="", max_length=2000)


class Joined(_Message):
    """The coordinator knows the device.

    Attributes:
        num_samples: of the client; None until a device that holds data has said so.
    """

    num_samples: int | None = None


TimedActionRow = tuple[str, int, str, int, float, float]


class DeviceReport(_Message):
    """What comes with a stage's update. Losses are known on the last stage alone.

    Attributes:
        num_examples: samples that the stage processed in local training.
        num_samples: samples that the client has.
        num_steps: optimizer steps of the round.
        rate_sum: the sum of the coefficients with which the steps' gradients went into the update.
        loss_sum, weight, num_correct: over local training.
        evaluation_loss_sum, evaluation_weight, evaluation_correct: of the round's starting model on
            the client's own data, where asked for.
        pipeline_bytes: bytes that this device sent to the client's other devices.
        train_s: seconds of local training.
        timeline: timed actions of one step, where asked for.
        generation: of the pipeline that made it; updates of one client from several do not fit together.
        forgotten: tensors of which the client lost what the coordinator holds, so that they count from zero again.
    """

    num_examples: int = Field(ge=0)
    num_samples: int = Field(default=0, ge=0)
    num_steps: int = Field(default=0, ge=0)
    rate_sum: float = Field(default=0.0, ge=0)
    loss_sum: float = 0.0
    weight: float = 0.0
    num_correct: float = 0.0
    evaluation_loss_sum: float = 0.0
    evaluation_weight: float = 0.0
    evaluation_correct: float = 0.0
    pipeline_bytes: int = 0
    train_s: float = 0.0
    timeline: tuple[TimedActionRow, ...] = ()
    generation: str = Field(default="", max_length=48, pattern=r"^[0-9A-Za-z-]*$")
    forgotten: tuple[str, ...] = ()


class ProgressReport(_Message):
    """How far a client is in its round; sent by its last stage now and then."""

    round: int
    samples_done: int
    samples_total: int
    loss: float


class FailureReport(_Message):
    """A device cannot go on.

    Attributes:
        kind: name of the error's class in `fedmp.errors`.
        message: for people.
        round, generation: in which it happened.
    """

    kind: str
    message: str
    round: int = 0
    generation: int = Field(default=0, ge=0, le=2**31)


class Receipt(_Message):
    """The coordinator has an update safely in its journal."""

    round: int
    num_bytes: int
