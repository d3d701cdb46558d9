"""The end of a process, noticed when it ends: one thread waits for all of them at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

__all__ = ["Sentinels"]


class Sentinels:
    """Tells of each process that ends, whoever ended it.

    Args:
        on_end: called in a thread of its own; must not block.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._news, self._tell = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._watch, name="fedmp-sentinels", daemon=True)
        self._thread.start()

    def watch(self, process: BaseProcess) -> None:
        """Tell when this process ends; it may be closed before."""
        # a descriptor of our own: the process's is closed, and its number used again, by whoever closes it
        self._tell.send(os.dup(process.sentinel))

    def close(self) -> None:
        """Watch no more."""
        self._tell.close()
        self._thread.join()
        self._news.close()

    def _watch(self) -> None:
        watched = set[int]()
        try:
            while True:
                for ready in wait([self._news, *watched]):
                    if ready is self._news:
                        watched.add(self._news.recv())
                        continue
                    assert isinstance(ready, int)
                    watched.remove(ready)
                    os.close(ready)
                    self._on_end()
        except EOFError:  # closed
            for descriptor in watched:
                os.close(descriptor)
