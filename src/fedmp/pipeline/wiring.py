"""Join a device's stages to their neighbours: four links a stage, over the transport or within the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from fedmp.pipeline.clock import Clock
from fedmp.pipeline.frames import FrameKind, FrameLayout
from fedmp.pipeline.gradients import Exchange
from fedmp.pipeline.inbox import Inbox, Message
from fedmp.pipeline.links import Handover, Receiver, Sender
from fedmp.pipeline.microbatches import MicroBatches
from fedmp.pipeline.options import RunnerOptions
from fedmp.pipeline.stage_work import StageWork
from fedmp.pipeline.transport import Transport

__all__ = ["Part", "Wiring", "wire"]


class Part:
    """A stage of this device with its links; None, or missing, where the pipeline begins or ends.

    Attributes:
        work: what the stage computes.
        inputs, outputs: of its forward, by whether it trains.
        gradients: of its outputs, that come in.
        input_gradients: that go out.
    """

    def __init__(self, work: StageWork) -> None:
        self.work = work
        self.inputs: dict[bool, Receiver | Handover] = {}
        self.outputs: dict[bool, Sender | Handover] = {}
        self.gradients: Receiver | Handover | None = None
        self.input_gradients: Sender | Handover | None = None

    def take_inputs(
        self, microbatch: int, batch: MicroBatches, clock: Clock, *, training: bool
    ) -> Sequence[torch.Tensor]:
        """The stage's inputs of a micro-batch: from the batch, or from the stage before."""
        if self.work.is_first:
            assert batch.inputs is not None
            return batch.inputs[microbatch]
        start_s = time.perf_counter()
        tensors = self.inputs[training].take(microbatch)
        clock.ended("wait", self.work.index, microbatch, start_s)
        return tensors


@dataclass(frozen=True)
class Wiring:
    """A device's stages with all of their links.

    Attributes:
        parts: by stage.
        senders, receivers: every end of a link on this device.
        exchange: for tied gradients and norms.
        inboxes: by peer, where the transport needs receives in the order of the sends; else empty.
    """

    parts: dict[int, Part]
    senders: list[Sender | Handover]
    receivers: list[Receiver | Handover]
    exchange: Exchange
    inboxes: dict[int, Inbox]

    def expect(self, messages: Callable[[int], Iterable[Message]], *, training: bool) -> None:
        """Start a step in which each peer sends `messages(peer)`, and post the first receives."""
        ends = [part.inputs.get(training) for part in self.parts.values()]
        ends += [part.gradients for part in self.parts.values()] if training else []
        receivers = [end for end in ends if isinstance(end, Receiver)]
        for peer, inbox in self.inboxes.items():
            inbox.begin(messages(peer), {(r.kind, r.stage): r for r in receivers if r.peer == peer})
            inbox.post()


def wire(
    works: Sequence[StageWork],
    transport: Transport | None,
    device: int,
    placement: Sequence[Sequence[int]],
    options: RunnerOptions,
) -> Wiring:
    """Make the links of a device.

    Args:
        works: its stages.
        transport: to the other devices.
        device: its number.
        placement: the stages of each device.
        options: say what is compressed.
    """
    parts = {work.index: Part(work) for work in works}
    wiring = Wiring(parts, [], [], Exchange(transport, device, placement), {})
    for stage, part in sorted(parts.items()):
        if part.work.is_last:
            continue
        if stage + 1 in parts:
            _hand_over(part, parts[stage + 1], wiring)
        else:
            _link_to_next(part, transport, wiring, options)
    for stage, part in sorted(parts.items()):
        if not part.work.is_first and stage - 1 not in parts:
            _link_to_previous(part, transport, wiring, options)
    if transport is not None and transport.is_ordered:
        for receiver in wiring.receivers:
            if isinstance(receiver, Receiver):
                receiver.inbox = wiring.inboxes.setdefault(receiver.peer, Inbox())
    return wiring


def _hand_over(before: Part, after: Part, wiring: Wiring) -> None:
    for training in (True, False):
        forward = Handover()
        before.outputs[training] = after.inputs[training] = forward
        wiring.receivers.append(forward)
    if after.work.input_gradients:
        before.gradients = after.input_gradients = back = Handover()
        wiring.receivers.append(back)


def _link_to_next(part: Part, transport: Transport | None, wiring: Wiring, options: RunnerOptions) -> None:
    assert transport is not None
    stage = part.work.index
    peer = wiring.exchange.device_of[stage + 1]
    blueprint = part.work.stage.blueprint
    for training in (True, False):
        specs = blueprint.program(training=training).outputs
        part.outputs[training] = sender = Sender(
            transport,
            peer=peer,
            kind=FrameKind.ACTIVATION,
            stage=stage,
            layout_of=lambda size, specs=specs: FrameLayout.of(specs, size, options.compress_activations),  # type: ignore[misc]
        )
        wiring.senders.append(sender)
    if part.work.output_gradients:
        part.gradients = receiver = Receiver(
            transport,
            peer=peer,
            kind=FrameKind.GRADIENT,
            stage=stage + 1,
            layout_of=_gradient_layout(part.work, options, of_inputs=False),
        )
        wiring.receivers.append(receiver)


def _link_to_previous(
    part: Part, transport: Transport | None, wiring: Wiring, options: RunnerOptions
) -> None:
    assert transport is not None
    stage = part.work.index
    peer = wiring.exchange.device_of[stage - 1]
    blueprint = part.work.stage.blueprint
    for training in (True, False):
        specs = blueprint.program(training=training).inputs
        part.inputs[training] = receiver = Receiver(
            transport,
            peer=peer,
            kind=FrameKind.ACTIVATION,
            stage=stage - 1,
            layout_of=lambda size, specs=specs: FrameLayout.of(specs, size, options.compress_activations),  # type: ignore[misc]
        )
        wiring.receivers.append(receiver)
    if part.work.input_gradients:
        part.input_gradients = sender = Sender(
            transport,
            peer=peer,
            kind=FrameKind.GRADIENT,
            stage=stage,
            layout_of=_gradient_layout(part.work, options, of_inputs=True),
        )
        wiring.senders.append(sender)


def _gradient_layout(
    work: StageWork, options: RunnerOptions, *, of_inputs: bool
) -> Callable[[int], FrameLayout]:
    program = work.stage.blueprint.train
    listed = program.inputs if of_inputs else program.outputs
    specs = tuple(spec for spec in listed if spec.has_gradient)
    return lambda size: FrameLayout.of(specs, size, options.compress_gradients)
