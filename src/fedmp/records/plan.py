"""Which layers form which stage on which device of one client: the planner's answer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

__all__ = ["Plan", "StagePlan"]


class StagePlan(BaseModel):
    """One stage: a contiguous run of layers on one device. Times are for one micro-batch on that device.

    Attributes:
        device: name of the device that runs it.
        start, stop: its layers are `plan.layer_names[start:stop]`.
        forward_s, backward_s: predicted seconds of one micro-batch; the backward has its share of the
            optimizer's step.
        send_s: predicted seconds to send one micro-batch's boundary to the next stage; 0 for the last, and
            where the next stage is on the same device.
        gradient_s: predicted seconds for that boundary's gradient to come back; 0 as `send_s` is.
        boundary_bytes: bytes of one micro-batch sent to the next stage; 0 as `send_s` is.
        parameter_bytes: its parameters, tied ones included.
        memory_bytes: predicted peak: weights, gradients, optimizer state, buffers, activations in flight, what
            a backward needs for a moment, frames, and the process itself.
        device_memory_bytes: what the device has.
        in_flight: the most micro-batches whose activations it holds at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    start: int = Field(ge=0)
    stop: int = Field(gt=0)
    forward_s: float
    backward_s: float
    send_s: float = 0.0
    gradient_s: float = 0.0
    boundary_bytes: float = 0.0
    parameter_bytes: int = 0
    memory_bytes: int = 0
    device_memory_bytes: int = 0
    in_flight: int = 1


class Plan(BaseModel):
    """How one client's model is cut over its devices. Round-trips through JSON.

    Attributes:
        layer_names: every layer of the model, in order.
        stages: the stages, in order; together they hold each layer exactly once. A device's name may occur
            several times: it runs all of these stages.
        partitioner, schedule: names of what made the plan and of the schedule it is for.
        num_microbatches, microbatch_size: how one batch is cut.
        step_s: predicted seconds of one optimizer step.
        bound_s: no plan can be faster than this, as far as the partitioner knows; 0 if it does not say.
        unused_devices: devices left out.
        fingerprint: of the graph that was planned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer_names: tuple[str, ...]
    stages: tuple[StagePlan, ...] = Field(min_length=1)
    partitioner: str
    schedule: str
    num_microbatches: int = Field(gt=0)
    microbatch_size: int = Field(gt=0)
    step_s: float
    bound_s: float = 0.0
    unused_devices: tuple[str, ...] = ()
    fingerprint: str = ""
    _graph: Any = PrivateAttr(default=None)

    def with_graph(self, graph: Any) -> Plan:
        """The same plan, remembering the traced model that it is for; JSON does not carry that."""
        plan = self.model_copy()
        plan._graph = graph
        return plan

    @property
    def graph(self) -> Any:
        """The traced model, where the plan was made in this process; else None."""
        return self._graph

    @property
    def digest(self) -> str:
        """A name of this plan: equal for plans that cut and schedule alike, whatever they predict."""
        places = [[stage.device, stage.start, stage.stop] for stage in self.stages]
        text = json.dumps([self.fingerprint, self.schedule, self.num_microbatches, places])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def num_stages(self) -> int:
        """Stages; a device may run several."""
        return len(self.stages)

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices in use, in order of rank: that of their first stages."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def num_devices(self) -> int:
        """Devices in use."""
        return len(self.devices)

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each device in use, in order of rank; usually one."""
        return tuple(
            tuple(index for index, stage in enumerate(self.stages) if stage.device == device)
            for device in self.devices
        )

    def memory_bytes(self, device: str) -> int:
        """Predicted peak memory of a device in use: of all of its stages."""
        return sum(stage.memory_bytes for stage in self.stages if stage.device == device)

    def device_memory_bytes(self, device: str) -> int:
        """Memory of a device in use."""
        return next(stage.device_memory_bytes for stage in self.stages if stage.device == device)

    @property
    def gap(self) -> float:
        """Optimality gap: (step_s - bound_s) / step_s, 1.0 where no bound is known."""
        return (self.step_s - self.bound_s) / self.step_s if self.step_s > 0 else 0.0

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layer indices before which the model is cut, without 0 and the end."""
        return tuple(stage.start for stage in self.stages[1:])
