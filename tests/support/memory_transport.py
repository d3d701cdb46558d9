"""A transport between threads of one process, for pipeline tests without sockets."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch

from fedmp.errors import DeadlineError

T = TypeVar("T")


class MemoryHub:
    """The mailboxes of one group."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[int, int, int], queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
        self._lock = threading.Lock()

    def box(self, source: int, target: int, tag: int) -> queue.Queue[torch.Tensor]:
        with self._lock:
            return self._boxes[source, target, tag]


class MemoryTransport:
    """One rank's end of a hub."""

    is_ordered = False

    def __init__(self, hub: MemoryHub, rank: int, *, generation: int = 0, timeout_s: float = 20.0) -> None:
        self.generation = generation
        self.device = torch.device("cpu")
        self._hub = hub
        self._rank = rank
        self._timeout_s = timeout_s

    def send(self, buffer: torch.Tensor, peer: int, tag: int) -> _Done:
        self._hub.box(self._rank, peer, tag).put(buffer.clone())
        return _Done()

    def receive(self, buffer: torch.Tensor, peer: int, tag: int) -> _Arrival:
        return _Arrival(self._hub.box(peer, self._rank, tag), buffer, self._timeout_s)


class _Done:
    def wait(self) -> None:
        pass


class _Arrival:
    def __init__(self, box: queue.Queue[torch.Tensor], buffer: torch.Tensor, timeout_s: float) -> None:
        self._box, self._buffer, self._timeout_s = box, buffer, timeout_s

    def wait(self) -> None:
        try:
            self._buffer.copy_(self._box.get(timeout=self._timeout_s))
        except queue.Empty:
            raise DeadlineError("nothing arrived") from None


class OrderedHub:
    """The ways between ranks of one group that know no tags, as nccl's do: first sent, first received."""

    def __init__(self) -> None:
        self._ways: dict[tuple[int, int], _Way] = defaultdict(_Way)
        self._lock = threading.Lock()

    def way(self, source: int, target: int) -> _Way:
        with self._lock:
            return self._ways[source, target]


class _Way:
    """One direction between two ranks: the n-th send meets the n-th receive, and nothing is buffered."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.sent: list[torch.Tensor] = []
        self.received: list[torch.Tensor] = []
        self.num_done = 0

    def meet(self) -> None:
        with self.changed:
            while self.num_done < min(len(self.sent), len(self.received)):
                source, target = self.sent[self.num_done], self.received[self.num_done]
                if source.numel() != target.numel():
                    raise AssertionError(
                        f"message {self.num_done} has {source.numel()} bytes, not {target.numel()}"
                    )
                target.copy_(source)
                self.num_done += 1
            self.changed.notify_all()


class OrderedTransport:
    """One rank's end of an ordered hub. A send is done when its receive has been posted, not before."""

    is_ordered = True

    def __init__(self, hub: OrderedHub, rank: int, *, generation: int = 0, timeout_s: float = 10.0) -> None:
        self.generation = generation
        self.device = torch.device("cpu")
        self._hub = hub
        self._rank = rank
        self._timeout_s = timeout_s

    def send(self, buffer: torch.Tensor, peer: int, tag: int) -> _Meeting:
        way = self._hub.way(self._rank, peer)
        return self._start(way, way.sent, buffer)

    def receive(self, buffer: torch.Tensor, peer: int, tag: int) -> _Meeting:
        way = self._hub.way(peer, self._rank)
        return self._start(way, way.received, buffer)

    def _start(self, way: _Way, ends: list[torch.Tensor], buffer: torch.Tensor) -> _Meeting:
        with way.changed:
            ends.append(buffer)
            number = len(ends)
        way.meet()
        return _Meeting(way, number, self._timeout_s)


class _Meeting:
    def __init__(self, way: _Way, number: int, timeout_s: float) -> None:
        self._way, self._number, self._timeout_s = way, number, timeout_s

    def wait(self) -> None:
        with self._way.changed:
            if not self._way.changed.wait_for(lambda: self._way.num_done >= self._number, self._timeout_s):
                raise DeadlineError("nobody came")


def run_ranks(work: Callable[[int], T], world_size: int) -> list[T]:
    """Run `work(rank)` on one thread a rank; raises the first error of any of them."""
    results: list[T | None] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        torch.set_num_threads(1)  # counts for each thread alone; more would fight over the cores
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]
