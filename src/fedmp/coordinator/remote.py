"""Clients that are devices elsewhere: the round is put on the board, and their updates come in through the journal.

A round is a transaction. It closes once, by what is written down then: which updates it takes, and who goes on
with its model. A coordinator that is killed before that waits on with the updates that are in the journal; one
that is killed after that closes the round in the same way again, and ends with the same model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from pydantic import BaseModel, ConfigDict

from fedmp.coordinator.board import Board
from fedmp.coordinator.clients import ClientUpdate, Opening, Trained
from fedmp.coordinator.global_model import GlobalModel
from fedmp.coordinator.journal import Journal
from fedmp.coordinator.waiting import Waiting
from fedmp.errors import ResumeError, RoundError
from fedmp.records import Note, Observer, Progress

__all__ = ["RemoteClients"]

_WATCH_S = 0.05
_SILENCE_S = 30.0  # six heartbeats


class RemoteClients:
    """Waits for devices to hand in what the board tells them to train.

    Args:
        board, journal, model: shared with the service.
        predicted_s: seconds that each client's round takes by its plan and links, in client order; read anew
            each round.
        round_timeout_s: a round that takes longer fails.
        watch: called several times a second; raises if the job cannot go on.
        observe: told of progress and of what happens meanwhile.
        explain_after_s: when to say first what the round waits for.
    """

    def __init__(
        self,
        board: Board,
        journal: Journal,
        model: GlobalModel,
        *,
        predicted_s: Mapping[str, float],
        round_timeout_s: float,
        watch: Callable[[], None],
        observe: Observer,
        explain_after_s: float = 10.0,
    ) -> None:
        self._board = board
        self._journal = journal
        self._model = model
        self._predicted_s = predicted_s
        self._round_timeout_s = round_timeout_s
        self._watch = watch
        self._observe = observe
        self._explain_after_s = explain_after_s
        self._told: dict[str, int] = {}
        self._late: Mapping[str, int] = {}

    def train(self, opening: Opening) -> Trained:
        """Open the round, wait until it may close, close it; its updates stay in the journal.

        Raises:
            RoundError: fewer than the minimum will finish it, or did in time.
            ResumeError: what late clients of an earlier run began with is gone.
            FedmpError: a device failed.
        """
        board, journal = self._board, self._journal
        before = (board.bytes_up, board.bytes_down, board.faults, board.recoveries)
        self._model.open(opening.round)
        journal.open(opening.round, opening.late, states=opening.states)
        for client, begun in opening.late.items():
            if not journal.keeps(begun):
                raise ResumeError(
                    f"{client} was late for round {begun} when the run ended, and the model that it began with is not "
                    f"in the journal; resume with the engine that the run began with"
                )
        decided = journal.decision()
        closed = self._close(opening) if decided is None else self._close_again(opening, decided)
        self._late = closed.late
        someone_goes_on = opening.round in closed.late.values()
        journal.seal(self._model.handed_out if someone_goes_on else None)
        updates = [self._update(client, num_devices) for client, num_devices in closed.counted.items()]
        journal.remember(updates)
        return Trained(
            updates=updates,
            late=closed.late,
            sat_out=closed.sat_out,
            bytes_up=board.bytes_up - before[0],
            bytes_down=board.bytes_down - before[1],
            faults=board.faults - before[2],
            recoveries=board.recoveries - before[3],
            simulated_s=max(self._predicted_s[client] for client in closed.counted),
        )

    def unreachable(self) -> frozenset[str]:
        """Clients of which no device was heard for a while, although it was heard before."""
        board = self._board
        silent = {member.client: board.silent_s(member.client) for member in board.members.values()}
        return frozenset(client for client, s in silent.items() if s is not None and s > _SILENCE_S)

    def committed(self, round: int) -> None:
        """Delete the updates that the round took, and what nobody goes on with."""
        self._journal.close(self._late)

    def _close(self, opening: Opening) -> _Closed:
        """Wait until the round may close, and write down how it does."""
        board, everyone = self._board, (*opening.cohort, *opening.late, *opening.spare)
        # of clients that the board knows to be late it also knows what is in; an upload that is checked
        # just now is in the journal a moment before that
        known = board.training()
        pushed = {
            client: board.pushed_by(client, opening.begun(client))
            for client in everyone
            if client not in known
        }
        found = self._journal.found(pushed)
        board.open_round(
            opening.round,
            opening.cohort,
            found,
            late=opening.late,
            spare=opening.spare,
            wanted=opening.closing.wanted,
            states=opening.states,
        )
        counted = self._wait(opening)
        took_part, given_up = board.training(), board.given_up()
        late = board.close_round(counted, oldest=opening.closing.oldest(opening.round))

        def pushed_now(client: str) -> list[tuple[str, ...]]:  # it may have been cut anew since
            return board.pushed_by(client, opening.begun(client))

        closed = _Closed(
            counted={client: len(pushed_now(client)) for client in self._in_client_order(counted)},
            late={client: late[client] for client in self._in_client_order(late)},
            sat_out={
                client: given_up.get(client, "late")
                for client in self._in_client_order(took_part)
                if client not in counted and client not in late
            },
        )
        self._journal.decide(closed.model_dump())
        return closed

    def _close_again(self, opening: Opening, decided: Mapping[str, object]) -> _Closed:
        """Close the round as an earlier process of the coordinator did, which was killed before the commit."""
        closed = _Closed.model_validate(decided)
        pushed = {client: self._board.pushed_by(client, begun) for client, begun in closed.late.items()}
        found = self._journal.found(pushed)
        self._board.open_round(opening.round, (), found, late=closed.late, states=opening.states)
        self._board.close_round(oldest=0)
        return closed

    def _wait(self, opening: Opening) -> tuple[str, ...]:
        """Wait until the round may close; returns the clients whose updates it takes."""
        board, closing = self._board, opening.closing
        waiting = Waiting(
            board, opening, timeout_s=self._round_timeout_s, explain_after_s=self._explain_after_s
        )
        started_s = time.monotonic()
        self._told = {}
        while True:
            if not board.wait_for_cohort(timeout_s=_WATCH_S):
                self._watch()
            waited_s = time.monotonic() - started_s
            self._tell(opening)
            finished, num_able = board.finished(), opening.num_clients - len(board.given_up())
            if len(finished) >= closing.wanted:
                return finished[: closing.wanted]
            if num_able < closing.minimum:
                raise RoundError(waiting.too_few(num_able))
            is_over = waited_s > self._round_timeout_s
            is_late = closing.deadline_s is not None and waited_s > closing.deadline_s
            if len(finished) >= closing.minimum and (is_over or is_late or not board.missing()):
                return finished
            if is_over:
                raise RoundError(waiting.failure())
            if (note := waiting.note(waited_s)) is not None:
                self._observe(Note(note))

    def _tell(self, opening: Opening) -> None:
        """Pass on what happened since the last time."""
        for incident in self._board.incidents():
            self._observe(Note(incident))
        for client, report in self._board.progress().items():
            if self._told.get(client) != report.samples_done:
                self._told[client] = report.samples_done
                self._observe(
                    Progress(opening.round, client, report.samples_done, report.samples_total, report.loss)
                )

    def _update(self, client: str, num_devices: int) -> ClientUpdate:
        update = self._journal.update_of(client, num_devices)
        assert update is not None
        return update

    def _in_client_order(self, clients: Collection[str]) -> tuple[str, ...]:
        return tuple(client for client in self._predicted_s if client in clients)


class _Closed(BaseModel):
    """How a round was closed.

    Attributes:
        counted: clients whose updates it takes, in client order, and of how many devices each was.
        late: clients that go on, by the round that they began with.
        sat_out: clients whose updates count in no round, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    counted: dict[str, int]
    late: dict[str, int]
    sat_out: dict[str, str]
