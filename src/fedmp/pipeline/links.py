"""Links: what brings a stage its inputs and gradients, and takes its results away.

A link joins two neighbouring stages in one direction. Between devices it is a sender at one end and a
receiver at the other, each with frames that are used again; on one device it just hands tensors over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fedmp.errors import PipelineError
from fedmp.pipeline.frames import Frame, FrameKind, FrameLayout, FrameTag, message_tag
from fedmp.pipeline.transport import Pending, Transport

if TYPE_CHECKING:
    from fedmp.pipeline.inbox import Inbox

__all__ = ["Handover", "Receiver", "Sender", "StepId"]


# small frames may be more than a schedule needs: posting receives while the device waits costs nothing, in
# the middle of its work a system call
_SMALL_BYTES = 1 << 18


class StepId(NamedTuple):
    """The step that all devices are in."""

    generation: int
    round: int
    step: int


class _FramePool:
    """Frames of one link, by number of samples."""

    def __init__(self, layout_of: Callable[[int], FrameLayout], device: torch.device) -> None:
        self._layout_of = layout_of
        self._device = device
        self._layouts: dict[int, FrameLayout] = {}
        self._free: dict[int, list[Frame]] = {}
        self.num_allocated = 0

    def take(self, size: int) -> Frame:
        """A free frame for `size` samples, with undefined content."""
        free = self._free.get(size)
        if free:
            return free.pop()
        self.num_allocated += 1
        return Frame(self._layout(size), self._device)

    def window(self, sizes: Sequence[int], most: int) -> int:
        """How many frames may be in use at once: `most`, or more where they are small."""
        return max(most, _SMALL_BYTES // self._layout(max(sizes)).num_bytes)

    def give_back(self, size: int, frame: Frame) -> None:
        """Return a frame that nobody reads or writes any more."""
        self._free.setdefault(size, []).append(frame)

    def keep_only(self, sizes: set[int]) -> None:
        """Drop the free frames of other sizes, so that odd batches do not pile up."""
        for size in [size for size in self._free if size not in sizes]:
            del self._free[size]

    def _layout(self, size: int) -> FrameLayout:
        layout = self._layouts.get(size)
        if layout is None:
            layout = self._layouts[size] = self._layout_of(size)
        return layout

    @property
    def num_bytes(self) -> int:
        """Memory of the free frames."""
        return sum(frame.buffer.numel() for frames in self._free.values() for frame in frames)


class Sender:
    """The end of a link that sends.

    Args:
        transport: to the other device.
        peer: the other device's rank.
        kind: what is sent.
        stage: that it comes from.
        layout_of: the frame's layout for a number of samples.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        peer: int,
        kind: FrameKind,
        stage: int,
        layout_of: Callable[[int], FrameLayout],
    ) -> None:
        self._transport = transport
        self._peer = peer
        self._kind = kind
        self._stage = stage
        self.pool = _FramePool(layout_of, transport.device)
        self._under_way: deque[tuple[Pending, int, Frame]] = deque()
        self._most = 1
        self._id = StepId(0, 0, 0)
        self._sizes: Sequence[int] = ()
        self.bytes_sent = 0

    def begin(self, step: StepId, sizes: Sequence[int], most: int) -> None:
        """Start a step.

        Args:
            step: what the frames carry.
            sizes: samples of each micro-batch.
            most: messages that the other end may not have asked for yet; with one more under way the
                oldest must have gone, so waiting for it costs nothing.
        """
        self._id, self._sizes, self._most = step, sizes, self.pool.window(sizes, most)
        self.pool.keep_only(set(sizes))

    def send(self, microbatch: int, tensors: Sequence[torch.Tensor | None]) -> None:
        """Copy tensors into a frame and start to send it."""
        if len(self._under_way) > self._most:
            self._wait_for_oldest()
        size = self._sizes[microbatch]
        frame = self.pool.take(size)
        frame.pack(FrameTag(*self._id, microbatch, self._kind), tensors)
        num_bytes = frame.layout.num_bytes
        tag = message_tag(self._kind, self._stage, microbatch, num_bytes)
        self._under_way.append((self._transport.send(frame.buffer, self._peer, tag), size, frame))
        self.bytes_sent += num_bytes

    def finish(self) -> None:
        """Wait until everything is sent."""
        while self._under_way:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        pending, size, frame = self._under_way.popleft()
        pending.wait()
        self.pool.give_back(size, frame)


class Receiver:
    """The end of a link that receives.

    Args:
        transport: to the other device.
        peer: the other device's rank.
        kind: what is received.
        stage: that it comes from.
        layout_of: the frame's layout for a number of samples.

    Attributes:
        inbox: of the peer, where the transport needs receives in the order of the sends; else None.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        peer: int,
        kind: FrameKind,
        stage: int,
        layout_of: Callable[[int], FrameLayout],
    ) -> None:
        self._transport = transport
        self.peer = peer
        self.kind = kind
        self.stage = stage
        self.inbox: Inbox | None = None
        self.pool = _FramePool(layout_of, transport.device)
        self._queue: deque[int] = deque()
        self._arriving: dict[int, tuple[Pending, Frame]] = {}
        self._held: dict[int, Frame] = {}
        self._most = 1
        self._id = StepId(0, 0, 0)
        self._sizes: Sequence[int] = ()

    def begin(self, step: StepId, sizes: Sequence[int], order: Sequence[int], most: int) -> None:
        """Start a step.

        Args:
            step: what the frames must carry.
            sizes: samples of each micro-batch.
            order: micro-batches in the order of their use.
            most: frames that may be in use at once, those that arrive and those that are held; small ones
                may be more.
        """
        self._id, self._sizes, self._most = step, sizes, self.pool.window(sizes, most)
        self._queue = deque(order if self.inbox is None else ())
        self.pool.keep_only(set(sizes))

    def post(self) -> None:
        """Ask for as many messages as may be in use."""
        if self.inbox is not None:
            self.inbox.post()
            return
        while self._queue and self.has_room:
            self.start(self._queue.popleft())

    @property
    def has_room(self) -> bool:
        """Whether one more message may be in use."""
        return len(self._arriving) + len(self._held) < self._most

    def start(self, microbatch: int) -> None:
        """Ask for one message."""
        size = self._sizes[microbatch]
        frame = self.pool.take(size)
        tag = message_tag(self.kind, self.stage, microbatch, frame.layout.num_bytes)
        self._arriving[microbatch] = self._transport.receive(frame.buffer, self.peer, tag), frame

    def take(self, microbatch: int) -> list[torch.Tensor]:
        """Wait for a micro-batch; its tensors stay valid until `release`."""
        if microbatch not in self._arriving:
            if self.inbox is not None:
                self.inbox.post_until(self, microbatch)
            else:
                self.post()
        pending, frame = self._arriving.pop(microbatch)
        pending.wait()
        self._held[microbatch] = frame
        return frame.unpack(FrameTag(*self._id, microbatch, self.kind))

    def release(self, microbatch: int) -> None:
        """The tensors of a micro-batch are no longer needed."""
        frame = self._held.pop(microbatch)
        frame.clear()
        self.pool.give_back(self._sizes[microbatch], frame)

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            PipelineError: the schedule left a message unread.
        """
        if self._queue or self._arriving or self._held:
            raise PipelineError(f"the schedule left a message of stage {self.stage} unread")


class Handover:
    """A link between two stages of one device: tensors by reference, without a copy.

    Both a sender and a receiver.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, Sequence[torch.Tensor | None]] = {}
        self.bytes_sent = 0

    def begin(self, step: StepId, sizes: Sequence[int], *_: object) -> None:
        """Start a step."""
        self._tensors.clear()

    def send(self, microbatch: int, tensors: Sequence[torch.Tensor | None]) -> None:
        """Hand over what a stage made."""
        self._tensors[microbatch] = [None if t is None else t.detach() for t in tensors]

    def post(self) -> None:
        """Nothing to ask for."""

    def take(self, microbatch: int) -> list[torch.Tensor]:
        """What was handed over; a schedule that passed the checker takes nothing too early."""
        return list(self._tensors.pop(microbatch))  # type: ignore[arg-type]

    def release(self, microbatch: int) -> None:
        """Nothing to give back."""

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            PipelineError: the schedule left something unread.
        """
        if self._tensors:
            raise PipelineError("the schedule left a handover unread")
