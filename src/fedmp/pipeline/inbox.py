"""What one peer sends to this device in a step, in order: for transports that match messages by order alone.

gloo tells messages apart by their tags, so receives may be posted in any order. nccl has no tags: the first
receive from a peer takes what the peer sends first. Every device knows every device's actions, so it also
knows that order, and posts its receives in it, whichever of its stages they are for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fedmp.pipeline.frames import FrameKind
from fedmp.pipeline.links import Receiver
from fedmp.schedule import ActionKind, PlacedAction

__all__ = ["Inbox", "Message", "messages_in_evaluation", "messages_in_training"]


class Message(NamedTuple):
    """A message between two devices: what it holds, the stage it comes from, its micro-batch."""

    kind: FrameKind
    stage: int
    microbatch: int


class Inbox:
    """The receivers of one peer's messages."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Receiver, int]] = deque()

    def begin(self, messages: Iterable[Message], receivers: Mapping[tuple[FrameKind, int], Receiver]) -> None:
        """Start a step.

        Args:
            messages: in the order in which the peer sends them.
            receivers: by what a message holds and the stage it comes from; one without is not sent.
        """
        self._queue.clear()
        for kind, stage, microbatch in messages:
            if (kind, stage) in receivers:
                self._queue.append((receivers[kind, stage], microbatch))

    def post(self) -> None:
        """Ask for messages until the next one's receiver holds as many as it may."""
        while self._queue and self._queue[0][0].has_room:
            receiver, microbatch = self._queue.popleft()
            receiver.start(microbatch)

    def post_until(self, wanted: Receiver, wanted_microbatch: int) -> None:
        """Ask for a message that is needed now, and for all that come before it."""
        while self._queue:
            receiver, microbatch = self._queue.popleft()
            receiver.start(microbatch)
            if receiver is wanted and microbatch == wanted_microbatch:
                return


def messages_in_training(
    actions: Sequence[PlacedAction], device_of: Mapping[int, int], target: int
) -> Iterator[Message]:
    """What a device with these actions sends to another in a training step, in order.

    Args:
        actions: of the device that sends.
        device_of: each stage's device.
        target: the other device.
    """
    for kind, microbatch, stage in actions:
        if kind is ActionKind.FORWARD and device_of.get(stage + 1) == target:
            yield Message(FrameKind.ACTIVATION, stage, microbatch)
        is_backward = kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)
        if is_backward and device_of.get(stage - 1) == target:
            yield Message(FrameKind.GRADIENT, stage, microbatch)


def messages_in_evaluation(
    stages: Sequence[int], device_of: Mapping[int, int], target: int, num_microbatches: int
) -> Iterator[Message]:
    """What a device with these stages sends to another in evaluation, in order."""
    for microbatch in range(num_microbatches):
        for stage in stages:
            if device_of.get(stage + 1) == target:
                yield Message(FrameKind.ACTIVATION, stage, microbatch)
