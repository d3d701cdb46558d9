"""Faults that a job injects into its own devices, to see what becomes of it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Fault"]

_DAMAGE = ("drop", "corrupt")
_WITH_MICROBATCH = ("forward", "backward", "send")


class Fault(BaseModel):
    """One thing that goes wrong, once, at an exact point of the training.

    Attributes:
        device: "client/device", by the names of the topology.
        round: in which it happens.
        phase: "meet" (the client's devices connect), "pull" (before the stages are fetched), "forward" or
            "backward" (after the computation, before its result is sent), "send" (as a boundary tensor is
            about to be sent), "between" (after an optimizer step), "push" (before the update is handed in).
        kind: "kill" (SIGKILL), "stop" (SIGSTOP: the device hangs), "delay" (by `delay_s`), "drop" (the message
            is lost; of an update, its acknowledgement), "corrupt" (the message, or the update, arrives damaged).
        step, stage, microbatch: of the pipeline; None for the first that comes.
        attempt: at which of the client's attempts at the round; a round that was disturbed is begun anew.
        delay_s: how long a "delay" is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field(pattern=r"^[^/]+/.+$")
    round: int = Field(ge=1)
    phase: Literal["meet", "pull", "forward", "backward", "send", "between", "push"]
    kind: Literal["kill", "stop", "delay", "drop", "corrupt"]
    step: int | None = Field(default=None, ge=0)
    stage: int | None = Field(default=None, ge=0)
    microbatch: int | None = Field(default=None, ge=0)
    attempt: int = Field(default=1, ge=1)
    delay_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _makes_sense(self) -> Fault:
        if self.kind in _DAMAGE and self.phase not in ("send", "push"):
            raise ValueError(f"{self.kind!r} happens to messages: use phase send or push, not {self.phase}")
        if (self.kind == "delay") != (self.delay_s > 0):
            raise ValueError("a delay needs delay_s above 0, and nothing else has one")
        if self.microbatch is not None and self.phase not in _WITH_MICROBATCH:
            raise ValueError(f"phase {self.phase} has no micro-batches")
        return self
