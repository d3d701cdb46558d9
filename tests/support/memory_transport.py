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
