"""The model's results on their way from the last stage's device to the one that asked for them.

Their shapes are known on the last device alone, so each result travels as two messages: one of a fixed size
that describes it, then its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from fedmp.errors import FrameError
from fedmp.pipeline.frames import Frame, FrameKind, FrameLayout, FrameTag, message_tag
from fedmp.pipeline.links import StepId
from fedmp.pipeline.transport import Pending, Transport

__all__ = ["OutputSender", "receive_outputs"]

_DESCRIPTION_BYTES = 4096
_DESCRIPTION = FrameLayout([(_DESCRIPTION_BYTES,)], [torch.uint8])


class OutputSender:
    """Sends one step's results.

    Args:
        transport: to the other devices.
        peer: the rank of the device that asked.
        stage: the last one.
        step: what the frames carry.
    """

    def __init__(self, transport: Transport, *, peer: int, stage: int, step: StepId) -> None:
        self._transport = transport
        self._peer = peer
        self._stage = stage
        self._step = step
        self._packed: list[tuple[int, Frame]] = []
        self._under_way: list[tuple[Pending, Frame]] = []
        self.bytes_sent = 0

    def send(self, microbatch: int, values: Sequence[Any]) -> None:
        """Start to send one micro-batch's flat result: tensors, None and plain numbers.

        Raises:
            FrameError: it holds something else, or more than can be described.
        """
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        text = json.dumps([_describe(value) for value in values]).encode()
        if len(text) > _DESCRIPTION_BYTES:
            raise FrameError(
                f"a result of {len(values)} values cannot be sent to another device; keep outputs on that "
                f"of the last stage"
            )
        padded = torch.zeros(_DESCRIPTION_BYTES, dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._start(_DESCRIPTION, FrameKind.OUTPUT_DESCRIPTION, microbatch, [padded])
        if tensors:
            layout = FrameLayout([tuple(t.shape) for t in tensors], [t.dtype for t in tensors])
            self._start(layout, FrameKind.OUTPUT, microbatch, tensors)

    def finish(self) -> None:
        """Send what has not been sent yet, and wait for all of it."""
        for tag, frame in self._packed:
            self._under_way.append((self._transport.send(frame.buffer, self._peer, tag), frame))
        self._packed = []
        for pending, _ in self._under_way:
            pending.wait()
        self._under_way = []

    def _start(
        self, layout: FrameLayout, kind: FrameKind, microbatch: int, tensors: Sequence[torch.Tensor]
    ) -> None:
        frame = Frame(layout, self._transport.device)
        frame.pack(FrameTag(*self._step, microbatch, kind), tensors)
        tag = message_tag(kind, self._stage, microbatch, layout.num_bytes)
        self.bytes_sent += layout.num_bytes
        if self._transport.is_ordered:
            self._packed.append((tag, frame))  # behind the activations, for which receives are posted
        else:
            self._under_way.append((self._transport.send(frame.buffer, self._peer, tag), frame))


def receive_outputs(
    transport: Transport, *, peer: int, stage: int, step: StepId, microbatch: int
) -> list[Any]:
    """Wait for one micro-batch's flat result; the other end of `OutputSender.send`."""

    def receive(layout: FrameLayout, kind: FrameKind) -> list[torch.Tensor]:
        frame = Frame(layout, transport.device)
        tag = message_tag(kind, stage, microbatch, layout.num_bytes)
        transport.receive(frame.buffer, peer, tag).wait()
        return frame.unpack(FrameTag(*step, microbatch, kind))

    (padded,) = receive(_DESCRIPTION, FrameKind.OUTPUT_DESCRIPTION)
    described = json.loads(bytes(padded.cpu().numpy()).rstrip(b"\0"))
    wanted = [entry for entry in described if isinstance(entry, dict)]
    if not wanted:
        return list(described)
    layout = FrameLayout(
        [tuple(entry["shape"]) for entry in wanted], [getattr(torch, entry["dtype"]) for entry in wanted]
    )
    tensors = iter(receive(layout, FrameKind.OUTPUT))
    return [next(tensors) if isinstance(entry, dict) else entry for entry in described]


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FrameError(f"a result that holds a {type(value).__name__} cannot be sent to another device")
