"""Control messages of the federation plane: plain data between a device and the coordinator."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Address",
    "DeviceReport",
    "FailureReport",
    "Instruction",
    "ProgressReport",
    "Receipt",
    "TimedActionRow",
]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


class Instruction(_Message):
    """What a device should do next.

    Attributes:
        kind: "train" a round; "wait" and ask again; "stop", the job is over.
        round: the round to train.
        reason: why to wait or stop, for people.
    """

    kind: Literal["train", "wait", "stop"]
    round: int = 0
    reason: str = ""


class Address(_Message):
    """Where the devices of a client find their first device."""

    host: str
    port: int = Field(gt=0, lt=65536)
    secret: str = ""


TimedActionRow = tuple[str, int, str, int, float, float]


class DeviceReport(_Message):
    """What comes with a stage's update. Losses are known on the last stage alone.

    Attributes:
        num_examples: samples that the stage processed in local training.
        loss_sum, weight, num_correct: over local training.
        evaluation_loss_sum, evaluation_weight, evaluation_correct: of the round's starting model on
            the client's own data, where asked for.
        pipeline_bytes: bytes that this device sent to the client's other devices.
        train_s: seconds of local training.
        timeline: timed actions of one step, where asked for.
    """

    num_examples: int = Field(ge=0)
    loss_sum: float = 0.0
    weight: float = 0.0
    num_correct: float = 0.0
    evaluation_loss_sum: float = 0.0
    evaluation_weight: float = 0.0
    evaluation_correct: float = 0.0
    pipeline_bytes: int = 0
    train_s: float = 0.0
    timeline: tuple[TimedActionRow, ...] = ()


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
    """

    kind: str
    message: str
    round: int = 0


class Receipt(_Message):
    """The coordinator has an update safely in its journal."""

    round: int
    num_bytes: int
