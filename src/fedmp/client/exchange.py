"""What a device sends and fetches while it goes on computing.

A strategy may let clients make the first steps of a round before they take in what comes in for it
(`Scope.delay_steps`). A device then need not wait between two rounds: it begins the next one from what it has just
saved, while another thread hands in the update of the last, waits until the next round opens, and pulls. These first
steps are a guess about what the coordinator will say, of work that can be done again: if it says anything else, they
are thrown away, and the device does as it is told from the state that it saved.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import torch

from fedmp.records import Instruction

__all__ = ["Exchange", "GuessedWrongError"]

Pulled = Mapping[str, torch.Tensor]


class GuessedWrongError(Exception):
    """The coordinator said something else than what the device has begun with."""


class Exchange:
    """Hands in an update, waits for the next round and fetches what comes in for it, on a thread of its own.

    Args:
        push: hands in the update; returns once it is safe.
        ask: what the coordinator says now; may take a while to answer.
        is_expected: whether that is what the device has begun with.
        pull: fetches what comes in.
    """

    def __init__(
        self,
        push: Callable[[], None],
        *,
        ask: Callable[[], Instruction],
        is_expected: Callable[[Instruction], bool],
        pull: Callable[[], Pulled],
    ) -> None:
        self._push = push
        self._ask = ask
        self._is_expected = is_expected
        self._pull = pull
        self._pulled: Future[Pulled] = Future()
        self._is_over = threading.Event()
        threading.Thread(target=self._run, name="fedmp-exchange", daemon=True).start()

    def result(self) -> Pulled:
        """What came in; waits for it.

        Raises:
            GuessedWrongError: the coordinator said something else.
            FedmpError: the update could not be handed in, or nothing be fetched.
        """
        return self._pulled.result()

    def abandon(self) -> None:
        """Hand the update in if it is not yet, and then stop; does not wait for that."""
        self._is_over.set()

    def _run(self) -> None:
        try:
            self._push()
            while (instruction := self._ask()).kind == "wait":
                if self._is_over.is_set():
                    raise GuessedWrongError
            if not self._is_expected(instruction):
                raise GuessedWrongError
            self._pulled.set_result(self._pull())
        except Exception as error:  # whatever it is, the device must hear of it
            self._pulled.set_exception(error)
