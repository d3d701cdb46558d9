"""What the coordinator waits for, in words: told while it waits, at growing intervals, and when it gives up."""

from __future__ import annotations

from fedmp.coordinator.board import Board
from fedmp.coordinator.clients import Opening

__all__ = ["Waiting"]

_QUIET_S = 10.0  # two heartbeats of a device
_LONGEST_PAUSE_S = 300.0


class Waiting:
    """The wait for a round's clients. Whoever waits passes the time.

    Args:
        board: knows who is heard, how far they are, and who is missing.
        opening: of the round.
        timeout_s: after which the round fails.
        explain_after_s: when to say first what is waited for; each pause is twice the one before.
    """

    def __init__(self, board: Board, opening: Opening, *, timeout_s: float, explain_after_s: float) -> None:
        self._board = board
        self._opening = opening
        self._timeout_s = timeout_s
        self._pause_s = explain_after_s
        self._next_s = explain_after_s
        self._is_after_deadline = False

    def note(self, waited_s: float) -> str | None:
        """What to tell now, if anything.

        Nothing is told while all clients are still at work and well.

        Args:
            waited_s: seconds since the round was opened.
        """
        closing = self._opening.closing
        if closing.deadline_s is not None and waited_s >= closing.deadline_s and not self._is_after_deadline:
            self._is_after_deadline = True
            return (
                f"round {self._opening.round}: its deadline of {closing.deadline_s:g} s is over, "
                f"{self._count(closing.minimum)}; it waits for up to {self._timeout_s:g} s: {self._missing()}"
            )
        if waited_s < self._next_s:
            return None
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._next_s = waited_s + self._pause_s
        if not self._board.finished() and not any(map(self._is_quiet, self._board.missing())):
            return None
        needed = closing.minimum if self._is_after_deadline else closing.wanted
        return f"round {self._opening.round}: {self._count(needed)}; waiting for {self._missing()}"

    def failure(self) -> str:
        """Why the round is given up."""
        return (
            f"{self._in()} reported within {self._timeout_s:g} s, "
            f"{self._needed(self._opening.closing.minimum)}; missing: {self._missing()}"
        )

    def too_few(self, num_able: int) -> str:
        """Why nobody needs to wait any longer."""
        why = "; ".join(f"{client}: {reason}" for client, reason in self._board.given_up().items())
        return (
            f"{num_able} of {self._opening.num_clients} clients are left in the round, "
            f"{self._needed(self._opening.closing.minimum)}; {why}. What was committed is safe: mend it and resume "
            f"the run"
        )

    def _count(self, needed: int) -> str:
        return f"{self._in()} are in, {self._needed(needed)}"

    def _in(self) -> str:
        return f"{len(self._board.finished())} of {self._opening.num_clients} clients"

    def _needed(self, number: int) -> str:
        return "all are needed" if number == self._opening.num_clients else f"{number} are needed"

    def _missing(self) -> str:
        training = self._board.training()
        return "; ".join(
            f"{client} (stage {', '.join(map(str, stages))}"
            + (f", since round {training[client]}" if training.get(client, 0) < self._opening.round else "")
            + f") {self._how_it_is(client)}"
            for client, stages in self._board.missing().items()
        )

    def _how_it_is(self, client: str) -> str:
        silent_s, progress = self._board.silent_s(client), self._board.progress().get(client)
        if silent_s is None:
            return "was never heard"
        if progress is None or self._is_quiet(client):
            return f"silent for {silent_s:.0f} s"
        return f"at {progress.samples_done} of {progress.samples_total} samples"

    def _is_quiet(self, client: str) -> bool:
        silent_s = self._board.silent_s(client)
        return silent_s is None or silent_s > _QUIET_S
