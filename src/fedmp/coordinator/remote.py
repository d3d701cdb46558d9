"""Clients that are devices elsewhere: the round is put on the board, and their updates come in through the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from fedmp.coordinator.board import Board
from fedmp.coordinator.clients import ClientUpdate, Opening, Trained
from fedmp.coordinator.journal import Journal
from fedmp.errors import RoundError
from fedmp.records import Note, Observer, Progress

__all__ = ["RemoteClients"]

_WATCH_S = 0.05


class RemoteClients:
    """Waits for devices to hand in what the board tells them to train.

    Args:
        board, journal: shared with the service.
        predicted_s: seconds that each client's round takes by its plan and links; read anew each round.
        round_timeout_s: a round that takes longer fails.
        watch: called several times a second; raises if the job cannot go on.
        observe: told of progress and of what happens meanwhile.
    """

    def __init__(
        self,
        board: Board,
        journal: Journal,
        *,
        predicted_s: Mapping[str, float],
        round_timeout_s: float,
        watch: Callable[[], None],
        observe: Observer,
    ) -> None:
        self._board = board
        self._journal = journal
        self._predicted_s = predicted_s
        self._round_timeout_s = round_timeout_s
        self._watch = watch
        self._observe = observe
        self._told: dict[str, int] = {}

    def train(self, opening: Opening) -> Trained:
        """Open the round, wait until it may close, close it; its updates stay in the journal.

        Raises:
            RoundError: fewer than the minimum will finish it, or did in time.
            FedmpError: a device failed.
        """
        board, cohort = self._board, opening.cohort
        before = (board.bytes_up, board.bytes_down, board.faults, board.recoveries)
        self._journal.open(opening.round)
        found = self._journal.found({client: board.pushed_by(client) for client in cohort})
        board.open_round(opening.round, cohort, found)
        finished = self._wait(opening)
        board.close_round()
        given_up = board.given_up()
        return Trained(
            updates=[self._update(client) for client in finished],
            sat_out={client: given_up.get(client, "late") for client in cohort if client not in finished},
            bytes_up=board.bytes_up - before[0],
            bytes_down=board.bytes_down - before[1],
            faults=board.faults - before[2],
            recoveries=board.recoveries - before[3],
            simulated_s=max(self._predicted_s[client] for client in cohort),
        )

    def committed(self, round: int) -> None:
        """Delete the round's updates."""
        self._journal.close()

    def _wait(self, opening: Opening) -> tuple[str, ...]:
        """Wait for the cohort; returns the clients that finished the round."""
        board, minimum, num_clients = self._board, opening.minimum, len(opening.cohort)
        deadline_s = time.monotonic() + self._round_timeout_s
        self._told = {}
        while True:
            is_complete = board.wait_for_cohort(timeout_s=_WATCH_S)
            if not is_complete:
                self._watch()
            self._tell()
            given_up, finished = board.given_up(), board.finished()
            if num_clients - len(given_up) < minimum:
                why = "; ".join(f"{client}: {reason}" for client, reason in given_up.items())
                raise RoundError(
                    f"{num_clients - len(given_up)} of {num_clients} clients are left in the round, "
                    f"{_needed(minimum, opening.cohort)}; {why}. What was committed is safe: mend it and resume "
                    f"the run"
                )
            is_late = time.monotonic() > deadline_s
            if is_late and len(finished) < minimum:
                raise RoundError(self._explain(opening))
            if is_late or (is_complete and len(finished) >= minimum):
                return finished

    def _tell(self) -> None:
        """Pass on what happened since the last time."""
        for incident in self._board.incidents():
            self._observe(Note(incident))
        for client, report in self._board.progress().items():
            if self._told.get(client) != report.samples_done:
                self._told[client] = report.samples_done
                self._observe(
                    Progress(report.round, client, report.samples_done, report.samples_total, report.loss)
                )

    def _explain(self, opening: Opening) -> str:
        silent = [
            f"{client} (stage {', '.join(map(str, stages))}) "
            + (
                f"last heard {heard:.0f} s ago"
                if (heard := self._board.silent_s(client)) is not None
                else "never heard"
            )
            for client, stages in self._board.missing().items()
        ]
        return (
            f"{len(self._board.finished())} of {len(opening.cohort)} clients reported within "
            f"{self._round_timeout_s:g} s, {_needed(opening.minimum, opening.cohort)}; "
            f"missing: {'; '.join(silent)}"
        )

    def _update(self, client: str) -> ClientUpdate:
        update = self._journal.update_of(client, len(self._board.pushed_by(client)))
        assert update is not None
        return update


def _needed(minimum: int, cohort: Sequence[str]) -> str:
    return "all are needed" if minimum == len(cohort) else f"{minimum} are needed"
