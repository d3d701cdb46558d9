"""One batch's way forward through a device's stages: eval mode, no gradients, outputs where they are wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedmp.pipeline.clock import Clock
from fedmp.pipeline.inbox import messages_in_evaluation
from fedmp.pipeline.links import Handover, StepId
from fedmp.pipeline.microbatches import MicroBatches
from fedmp.pipeline.outputs import OutputSender, receive_outputs
from fedmp.pipeline.transport import Transport
from fedmp.pipeline.wiring import Part, Wiring
from fedmp.schedule import ActionKind

__all__ = ["Evaluation"]

_AHEAD = 3

KeepOutputs = Callable[[Any], None]


class Evaluation:
    """Evaluates one batch on this device's stages, in step with the other devices.

    Args:
        wiring: the stages with their links.
        transport: to the other devices; None if there are none.
        device: this device's number.
        clock: measures.
        step: what the frames carry.
    """

    def __init__(
        self, wiring: Wiring, transport: Transport | None, device: int, clock: Clock, step: StepId
    ) -> None:
        self._wiring = wiring
        self._parts = wiring.parts
        self._device_of = wiring.exchange.device_of
        self._last = len(self._device_of) - 1
        self._transport = transport
        self._device = device
        self._clock = clock
        self._step = step

    def run(self, batch: MicroBatches, keep_outputs: KeepOutputs | None, outputs_on: int | None) -> int:
        """Run all micro-batches.

        Args:
            batch: this device's part of it.
            keep_outputs: called with each result on the device that wants them.
            outputs_on: that device; None for that of the last stage.

        Returns:
            Bytes of results that were sent to another device.
        """
        source = self._device_of[self._last]
        target = source if outputs_on is None else outputs_on
        is_sent = target != source
        sender = self._sender(target) if is_sent and source == self._device else None
        self._begin(batch)
        for microbatch in range(len(batch.sizes)):
            for part in self._parts.values():
                self._evaluate(part, microbatch, batch, sender or keep_outputs)
        if is_sent and target == self._device:
            self._receive(source, len(batch.sizes), keep_outputs)
        if sender is None:
            return 0
        sender.finish()
        return sender.bytes_sent

    def _begin(self, batch: MicroBatches) -> None:
        order = range(len(batch.sizes))
        for part in self._parts.values():
            if not part.work.is_first:
                part.inputs[False].begin(self._step, batch.sizes, order, _AHEAD)
                part.inputs[False].post()
            if not part.work.is_last:
                part.outputs[False].begin(self._step, batch.sizes, _AHEAD + 1)
            part.work.begin(batch.targets, training=False)
        if self._wiring.inboxes:
            placement = self._wiring.exchange.placement
            self._wiring.expect(
                lambda peer: messages_in_evaluation(
                    placement[peer], self._device_of, self._device, len(batch.sizes)
                ),
                training=False,
            )

    def _evaluate(
        self, part: Part, microbatch: int, batch: MicroBatches, keep: OutputSender | KeepOutputs | None
    ) -> None:
        work = part.work
        inputs = part.take_inputs(microbatch, batch, self._clock, training=False)
        start_s = time.perf_counter()
        outputs = work.evaluate(microbatch, inputs)
        self._clock.computed(ActionKind.FORWARD, work.index, microbatch, start_s)
        if not work.is_last:
            link = part.outputs[False]
            link.send(microbatch, _apart(outputs, inputs) if isinstance(link, Handover) else outputs)
        else:
            own = _apart(outputs, inputs)
            result = work.unflatten(own)
            if isinstance(keep, OutputSender):
                keep.send(microbatch, own)
            elif keep is not None:
                keep(result)
            if batch.targets is not None:
                work.score(result, microbatch)
        if not work.is_first:
            part.inputs[False].release(microbatch)
            part.inputs[False].post()

    def _sender(self, target: int) -> OutputSender:
        assert self._transport is not None
        return OutputSender(self._transport, peer=target, stage=self._last, step=self._step)

    def _receive(self, source: int, num_microbatches: int, keep: KeepOutputs | None) -> None:
        assert self._transport is not None
        work = next(iter(self._parts.values())).work
        for microbatch in range(num_microbatches):
            outputs = receive_outputs(
                self._transport, peer=source, stage=self._last, step=self._step, microbatch=microbatch
            )
            if keep is not None:
                keep(work.unflatten(outputs))


def _apart(outputs: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[Any]:
    """Results that do not share memory with received frames, which will be used again."""
    borrowed = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return [
        value.clone()
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in borrowed
        else value
        for value in outputs
    ]
