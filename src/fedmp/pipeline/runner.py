"""Run a device's stages of a pipeline: the interpreter of a schedule's action list.

Each device runs the same steps on its own stages. Receives are posted ahead of their use, sends overlap
with computation, and the loss of a micro-batch is weighted by its share of the batch, so the gradient is
that of the whole batch for every batch size and every number of micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fedmp.errors import PipelineError
from fedmp.pipeline.clock import Clock
from fedmp.pipeline.evaluation import Evaluation
from fedmp.pipeline.gradients import clip_gradients, sum_over_stages, sum_tied_gradients
from fedmp.pipeline.inbox import messages_in_training
from fedmp.pipeline.links import Handover, StepId
from fedmp.pipeline.microbatches import BatchResult, MicroBatches
from fedmp.pipeline.options import RunnerOptions
from fedmp.pipeline.orders import Order, order_of
from fedmp.pipeline.rewrite import RandomKey
from fedmp.pipeline.stage_work import StageWork
from fedmp.pipeline.transport import Transport
from fedmp.pipeline.wiring import Part, wire
from fedmp.records import TimedAction
from fedmp.schedule import ActionKind, PlacedSchedule, Schedule
from fedmp.stages import Stage
from fedmp.tasks import Task

__all__ = ["DeviceRunner"]

_GRADIENTS_AHEAD = 2
_TAKES_GRADIENT = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)
_DEFAULT_OPTIONS = RunnerOptions()


class DeviceRunner:
    """Trains and evaluates a device's stages in step with the client's other devices.

    Args:
        stages: of this device, with weights, in ascending order.
        task: the loss; used on the last stage.
        transport: to the other devices, whose ranks are their numbers; None if this is the only one.
        device: this device's number.
        placement: the stages of each device.
        options: how to run them.
        seed: of dropout and other random calls; None leaves them to torch's global generator.
        observe: called with every timed action; None measures nothing.
        device_name: for the timed actions.

    Attributes:
        task: the loss.
        bytes_sent: to other devices, so far.
        observe, seed: may be changed between steps.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        task: Task,
        transport: Transport | None,
        *,
        device: int,
        placement: Sequence[Sequence[int]],
        options: RunnerOptions = _DEFAULT_OPTIONS,
        seed: int | None = None,
        observe: Callable[[TimedAction], None] | None = None,
        device_name: str = "",
    ) -> None:
        if [stage.blueprint.index for stage in stages] != list(placement[device]):
            raise ValueError(
                f"device {device} has stages {[stage.blueprint.index for stage in stages]}, its placement "
                f"says {list(placement[device])}"
            )
        if transport is None and len(placement) > 1:
            raise ValueError(f"{len(placement)} devices need a transport between them")
        self.stages = list(stages)
        self.task = task
        self._transport = transport
        self._device = device
        self._placement = tuple(map(tuple, placement))
        self._options = options
        self._clock = Clock(device_name, options.pace, observe)
        self._key = RandomKey(seed)
        self._works = [StageWork(stage, task, options, self._key) for stage in stages]
        self._num_stages = stages[0].blueprint.num_stages
        self._orders: dict[tuple[object, int], Order] = {}
        self._is_broken = False
        self._bytes_before = 0
        self._wiring = wire(self._works, transport, device, self._placement, options)

    @property
    def seed(self) -> int | None:
        """Of dropout and other random calls; None leaves them to torch's global generator."""
        return self._key.seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._key.seed = seed

    @property
    def observe(self) -> Callable[[TimedAction], None] | None:
        """Called with every timed action; None measures nothing."""
        return self._clock.observe

    @observe.setter
    def observe(self, observe: Callable[[TimedAction], None] | None) -> None:
        self._clock.observe = observe

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other devices since the runner was made."""
        return (
            self._bytes_before
            + self._wiring.exchange.bytes_sent
            + sum(end.bytes_sent for end in self._wiring.senders)
        )

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers that wait for their next use."""
        ends = [*self._wiring.senders, *self._wiring.receivers]
        return sum(end.pool.num_bytes for end in ends if not isinstance(end, Handover))

    def train_batch(
        self,
        batch: MicroBatches,
        schedule: Schedule | PlacedSchedule,
        *,
        round: int,
        step: int,
        total_weight: float | None = None,
    ) -> BatchResult:
        """Add the gradient of one batch's mean loss to the parameters' `grad`.

        The gradient is complete only after `finish_gradients`, which sums those of tied parameters.

        Args:
            batch: this device's part of it.
            schedule: the same on all devices.
            round, step: what the frames carry; the same on all devices.
            total_weight: what the loss is divided by; None for the weight of this batch. To accumulate
                several batches into one step, give the weight of all of them together.

        Returns:
            The batch's loss, on the last stage.

        Raises:
            PipelineError: a peer is gone, silent, or sent what does not belong here.
        """
        with self._working():
            order = self._order(schedule, len(batch.sizes))
            mine = order.actions[self._device]
            self._begin(batch, round, step, order, total_weight)
            run = {
                ActionKind.FORWARD: self._forward,
                ActionKind.BACKWARD: self._backward,
                ActionKind.BACKWARD_INPUT: self._backward,
                ActionKind.BACKWARD_WEIGHT: self._backward_weight,
            }
            parts = self._wiring.parts
            for kind, microbatch, stage in mine:
                run[kind](parts[stage], microbatch, batch)
            result = self._result()
            self._finish()
        return result

    def evaluate_batch(
        self,
        batch: MicroBatches,
        *,
        round: int,
        step: int,
        keep_outputs: Callable[[Any], None] | None = None,
        outputs_on: int | None = None,
    ) -> BatchResult:
        """Run one batch forward in eval mode, without gradients.

        Args:
            batch: this device's part of it; targets may be missing.
            round, step: what the frames carry; the same on all devices.
            keep_outputs: called with the model's result for each micro-batch, in order, on one device.
            outputs_on: that device's number; None for that of the last stage. The same on all devices.

        Returns:
            The batch's loss and correct predictions, on the last stage, if it has targets.

        Raises:
            PipelineError: a peer is gone, silent, or sent what does not belong here.
        """
        with self._working():
            id = StepId(self._generation, round, step)
            evaluation = Evaluation(self._wiring, self._transport, self._device, self._clock, id)
            self._bytes_before += evaluation.run(batch, keep_outputs, outputs_on)
            result = self._result()
            self._finish()
        return result

    def finish_gradients(self, *, round: int, step: int, max_norm: float | None = None) -> float | None:
        """Complete the gradients before the optimizer's step: sum tied ones, clip all of them.

        Args:
            round, step: what the frames carry; the same on all devices.
            max_norm: clip the gradient of the whole model to this 2-norm; None does not clip.

        Returns:
            The norm of the whole model's gradient before clipping, the same on all devices; None if
            it was not asked for.

        Raises:
            PipelineError: a peer is gone, silent, or sent what does not belong here.
        """
        with self._working():
            self._wiring.exchange.begin(StepId(self._generation, round, step))
            sum_tied_gradients(self.stages, self._wiring.exchange)
            if max_norm is not None:
                return clip_gradients(self.stages, self._wiring.exchange, max_norm)
        return None

    def sum_over_stages(self, own: Mapping[int, float], *, round: int) -> float:
        """Add up a number of every stage, in stage order, and so the same on all devices.

        Args:
            own: the numbers of this device's stages, by index.
            round: what the frames carry; the same on all devices, and once in a round.

        Raises:
            PipelineError: a peer is gone, silent, or sent what does not belong here.
        """
        with self._working():
            self._wiring.exchange.begin(StepId(self._generation, round, 0))
            return sum_over_stages(own, self._wiring.exchange)

    def note(self, kind: str, start_s: float) -> None:
        """Tell the observer of something that this device did from `start_s` until now, such as "step"."""
        self._clock.ended(kind, self.stages[0].blueprint.index, -1, start_s)

    def reconnect(self, transport: Transport | None) -> None:
        """Go on over a new transport, after an error or in a new generation.

        Gradients of a step that failed are not complete: clear them.

        Args:
            transport: with the same ranks as before.
        """
        self._bytes_before = self.bytes_sent
        self._transport = transport
        for work in self._works:
            work.abandon()
        self._wiring = wire(self._works, transport, self._device, self._placement, self._options)
        self._is_broken = False

    # one action

    def _forward(self, part: Part, microbatch: int, batch: MicroBatches) -> None:
        inputs = part.take_inputs(microbatch, batch, self._clock, training=True)
        start_s = time.perf_counter()
        outputs = part.work.forward(microbatch, inputs)
        self._clock.computed(ActionKind.FORWARD, part.work.index, microbatch, start_s)
        if not part.work.is_last:
            start_s = time.perf_counter()
            part.outputs[True].send(microbatch, outputs)
            self._clock.ended("send", part.work.index, microbatch, start_s)
        if not part.work.is_first:
            part.inputs[True].post()
        if part.gradients is not None:
            part.gradients.post()

    def _backward(self, part: Part, microbatch: int, batch: MicroBatches) -> None:
        work = part.work
        gradients: Sequence[torch.Tensor | None] = ()
        if part.gradients is not None:
            start_s = time.perf_counter()
            gradients = part.gradients.take(microbatch)
            self._clock.ended("wait", work.index, microbatch, start_s)
        start_s = time.perf_counter()
        of_inputs = work.backward(microbatch, gradients)
        kind = ActionKind.BACKWARD_INPUT if work.keeps_for_weights else ActionKind.BACKWARD
        self._clock.computed(kind, work.index, microbatch, start_s)
        if part.input_gradients is not None:
            start_s = time.perf_counter()
            part.input_gradients.send(microbatch, of_inputs)
            self._clock.ended("send", work.index, microbatch, start_s)
        if not work.keeps_for_weights:
            self._release(part, microbatch)

    def _backward_weight(self, part: Part, microbatch: int, batch: MicroBatches) -> None:
        start_s = time.perf_counter()
        part.work.backward_weight(microbatch)
        self._clock.computed(ActionKind.BACKWARD_WEIGHT, part.work.index, microbatch, start_s)
        self._release(part, microbatch)

    def _release(self, part: Part, microbatch: int) -> None:
        if part.gradients is not None:
            part.gradients.release(microbatch)
            part.gradients.post()
        if not part.work.is_first:
            part.inputs[True].release(microbatch)
            part.inputs[True].post()

    # one step

    def _begin(
        self,
        batch: MicroBatches,
        round: int,
        step: int,
        order: Order,
        total_weight: float | None,
    ) -> None:
        mine, peaks = order.actions[self._device], order.peaks
        id, sizes = StepId(self._generation, round, step), batch.sizes
        self._key.round, self._key.step = round, step
        for stage, part in self._wiring.parts.items():
            if not part.work.is_first:
                forwards = [a.microbatch for a in mine if a.stage == stage and a.kind is ActionKind.FORWARD]
                part.inputs[True].begin(id, sizes, forwards, peaks[stage] + 1)
                part.inputs[True].post()
            if part.gradients is not None:
                backwards = [a.microbatch for a in mine if a.stage == stage and a.kind in _TAKES_GRADIENT]
                keeps = any(a.kind is ActionKind.BACKWARD_INPUT for a in mine)
                part.gradients.begin(id, sizes, backwards, peaks[stage] + 1 if keeps else _GRADIENTS_AHEAD)
            if not part.work.is_last:
                part.outputs[True].begin(id, sizes, peaks[stage])
            if part.input_gradients is not None:
                part.input_gradients.begin(id, sizes, peaks[stage - 1])
        if self._wiring.inboxes:
            device_of = self._wiring.exchange.device_of
            self._wiring.expect(
                lambda peer: messages_in_training(order.actions[peer], device_of, self._device), training=True
            )
        splits = any(action.kind is ActionKind.BACKWARD_WEIGHT for action in mine)
        for part in self._wiring.parts.values():
            part.work.begin(batch.targets, training=True, splits=splits, total_weight=total_weight)

    def _result(self) -> BatchResult:
        last = self._wiring.parts.get(self._num_stages - 1)
        return BatchResult() if last is None else last.work.result()

    def _finish(self) -> None:
        for sender in self._wiring.senders:
            sender.finish()
        for receiver in self._wiring.receivers:
            receiver.finish()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Refuse to go on after an error: messages of the step that failed may still arrive."""
        if self._is_broken:
            raise PipelineError("a step of this pipeline failed; reconnect it over a new transport first")
        self._is_broken = True
        yield
        self._is_broken = False

    def _order(self, schedule: Schedule | PlacedSchedule, num_microbatches: int) -> Order:
        key = (schedule, num_microbatches)
        if key not in self._orders:
            self._orders[key] = order_of(schedule, self._placement, num_microbatches)
        return self._orders[key]

    # links

    @property
    def _generation(self) -> int:
        return 0 if self._transport is None else self._transport.generation
