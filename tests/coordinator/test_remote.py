"""A round over the board and the journal: when it closes, what it says while it waits, and that it closes once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fedmp.coordinator import Board, ClientUpdate, GlobalModel, Journal, Opening, RemoteClients, Trained
from fedmp.errors import ResumeError, RoundError
from fedmp.records import Event, Note, ProgressReport
from fedmp.strategy import Closing, FedAvg
from tests.support.service import STAGES, body, members, specs, state, update

MEMBERS = members()
BOTH = ("ann", "bob")
STALE = FedAvg(late="stale", min_clients=1, deadline_s=1e-9).closing(2)


class Federation:
    """A coordinator without its service; what devices would do is done as it looks round while it waits."""

    def __init__(self, folder: Path, *, timeout_s: float = 60.0, explain_after_s: float = 10.0) -> None:
        self.board, self.journal = Board(MEMBERS), Journal(folder, specs())
        self.notes: list[str] = []
        self.model = GlobalModel(specs(), state())
        self._script: Iterator[Callable[[], object]] = iter(())
        self.clients = RemoteClients(
            self.board,
            self.journal,
            self.model,
            predicted_s=dict.fromkeys(BOTH, 1.0),
            round_timeout_s=timeout_s,
            watch=lambda: next(self._script, lambda: None)(),
            observe=self._observe,
            explain_after_s=explain_after_s,
        )

    def train(self, opening: Opening, *script: Callable[[], object]) -> Trained:
        self._script = iter(script)
        return self.clients.train(opening)

    def push(self, client: str, round: int, value: float = 1.0) -> Callable[[], None]:
        def push() -> None:
            for stage in (0, 1):
                part = self.journal.temporary(client, stage)
                part.write_bytes(body(update(stage, value)))
                self.journal.accept(part, client, stage, STAGES[stage])
                assert self.board.reported(MEMBERS[f"{client}{stage}"], round, 5)

        return push

    def _observe(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.message)


def closing(num_clients: int = 2, **fields: object) -> Closing:
    return FedAvg(**fields).closing(num_clients)


def who(updates: object) -> list[tuple[str, int, float]]:
    assert isinstance(updates, list)
    return [(one.client, one.round, float(one["b.weight"][0])) for one in updates]


def test_updates_come_in_client_order_whoever_was_first(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    trained = federation.train(
        Opening(1, BOTH, closing()), federation.push("bob", 1, 2.0), federation.push("ann", 1, 3.0)
    )
    assert who(trained.updates) == [("ann", 1, 3.0), ("bob", 1, 2.0)]
    assert (trained.late, trained.sat_out) == ({}, {})


def test_a_round_closes_with_as_many_as_are_wanted_and_discards_the_others(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    rules = closing(fraction=0.5, over_selection=1.0)
    trained = federation.train(Opening(1, BOTH, rules), federation.push("bob", 1))
    assert who(trained.updates) == [("bob", 1, 1.0)]
    assert trained.sat_out == {"ann": "late"}
    assert federation.board.window(1, "ann") == "over"


def test_of_two_that_are_in_only_as_many_count_as_are_wanted(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    rules = closing(fraction=0.5, over_selection=1.0)

    def both() -> None:
        federation.push("bob", 1)()
        federation.push("ann", 1)()

    trained = federation.train(Opening(1, BOTH, rules), both)
    assert [update.client for update in trained.updates] == ["bob"]
    assert trained.sat_out == {"ann": "late"}


def test_a_client_that_is_late_counts_in_the_round_in_which_it_arrives(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    first = federation.train(Opening(1, BOTH, STALE), federation.push("ann", 1))
    assert (who(first.updates), first.late, first.sat_out) == ([("ann", 1, 1.0)], {"bob": 1}, {})
    federation.clients.committed(1)
    second = federation.train(
        Opening(2, ("ann",), closing(), late={"bob": 1}),
        federation.push("bob", 1, 7.0),
        federation.push("ann", 2, 8.0),
    )
    assert who(second.updates) == [("ann", 2, 8.0), ("bob", 1, 7.0)]
    federation.clients.committed(2)
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_is_checked_as_a_round_opens_counts_once_it_is_noted(tmp_path: Path) -> None:
    """It is in the journal already, but whether it counts is the board's to say."""
    federation = Federation(tmp_path)
    federation.train(Opening(1, BOTH, STALE), federation.push("ann", 1))
    for stage in (0, 1):
        part = federation.journal.temporary("bob", stage)
        part.write_bytes(body(update(stage, 7.0)))
        federation.journal.accept(part, "bob", stage, STAGES[stage])
    assert federation.board.reported(MEMBERS["bob0"], 1, 5)
    federation.clients.committed(1)
    one = FedAvg(fraction=0.5, over_selection=1.0, late="stale").closing(2)
    trained = federation.train(
        Opening(2, ("ann",), one, late={"bob": 1}),
        lambda: federation.board.reported(MEMBERS["bob1"], 1, 5),
        federation.push("ann", 2),
    )
    assert who(trained.updates) == [("bob", 1, 7.0)]


def test_a_client_that_is_too_late_sits_out(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    rules = closing(late="stale", min_clients=1, deadline_s=1e-9, max_staleness=2)
    federation.journal.open(1)
    federation.journal.seal(state())
    federation.journal.close({"bob": 1})
    trained = federation.train(Opening(2, ("ann",), rules, late={"bob": 1}), federation.push("ann", 2))
    assert (trained.late, trained.sat_out) == ({"bob": 1}, {})
    federation.clients.committed(2)
    trained = federation.train(Opening(3, ("ann",), rules, late={"bob": 1}), federation.push("ann", 3))
    assert (trained.late, trained.sat_out) == ({}, {"bob": "late"})


@pytest.mark.parametrize("arrives", ["before the kill", "after the restart"])
def test_a_coordinator_killed_after_a_round_closed_closes_it_in_the_same_way_again(
    arrives: str, tmp_path: Path
) -> None:
    killed = Federation(tmp_path)
    first = killed.train(Opening(1, BOTH, STALE), killed.push("ann", 1, 2.0))
    if arrives == "before the kill":
        killed.push("bob", 1, 3.0)()
    again = Federation(tmp_path)
    same = again.train(Opening(1, BOTH, STALE))
    assert who(same.updates) == who(first.updates) == [("ann", 1, 2.0)]
    assert same.late == first.late == {"bob": 1}
    again.clients.committed(1)
    if arrives == "after the restart":
        again.push("bob", 1, 3.0)()
    second = again.train(Opening(2, ("ann",), closing(), late={"bob": 1}), again.push("ann", 2, 4.0))
    assert who(second.updates) == [("ann", 2, 4.0), ("bob", 1, 3.0)]


def test_a_coordinator_killed_before_a_round_closed_waits_on_with_what_is_in(tmp_path: Path) -> None:
    killed = Federation(tmp_path, timeout_s=0.01)
    with pytest.raises(RoundError):
        killed.train(Opening(1, BOTH, closing()), killed.push("bob", 1, 2.0))
    again = Federation(tmp_path)
    trained = again.train(Opening(1, BOTH, closing()), again.push("ann", 1, 3.0))
    assert who(trained.updates) == [("ann", 1, 3.0), ("bob", 1, 2.0)]


def test_late_clients_of_another_engine_s_run_are_not_taken_for_ours(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"bob was late for round 1 .* resume with the engine"):
        Federation(tmp_path).train(Opening(2, ("ann",), STALE, late={"bob": 1}))


def test_the_wait_is_explained_while_it_lasts(tmp_path: Path) -> None:
    federation = Federation(tmp_path, explain_after_s=1e-9)
    board = federation.board
    report = ProgressReport(round=1, samples_done=3, samples_total=9, loss=0.5)

    def bob_gets_on() -> None:
        for member in MEMBERS.values():
            board.heard(member)
        board.progressed(MEMBERS["bob1"], report)

    federation.train(
        Opening(1, BOTH, closing()),
        federation.push("ann", 1),
        bob_gets_on,
        lambda: None,
        federation.push("bob", 1),
    )
    assert "round 1: 1 of 2 clients are in, all are needed; waiting for bob (stage 0, 1) was never heard" in (
        federation.notes
    )
    assert federation.notes[-1].endswith("waiting for bob (stage 0, 1) at 3 of 9 samples")


def test_while_all_are_well_nothing_is_said(tmp_path: Path) -> None:
    federation = Federation(tmp_path, explain_after_s=1e-9)

    def all_are_heard() -> None:
        for member in MEMBERS.values():
            federation.board.heard(member)

    def both() -> None:
        federation.push("ann", 1)()
        federation.push("bob", 1)()

    all_are_heard()
    federation.train(Opening(1, BOTH, closing()), all_are_heard, all_are_heard, both)
    assert federation.notes == []


def test_a_round_that_outlasts_its_deadline_says_so_once_and_waits_on(tmp_path: Path) -> None:
    federation = Federation(tmp_path, timeout_s=50)
    rules = closing(min_clients=1, deadline_s=1e-9)
    nothing = [lambda: None] * 3
    trained = federation.train(Opening(4, BOTH, rules), *nothing, federation.push("bob", 4))
    assert [update.client for update in trained.updates] == ["bob"]
    assert federation.notes == [
        "round 4: its deadline of 1e-09 s is over, 0 of 2 clients are in, 1 are needed; it waits for up to 50 s: "
        "ann (stage 0, 1) was never heard; bob (stage 0, 1) was never heard"
    ]


def test_a_round_that_fails_says_who_is_missing_and_since_when(tmp_path: Path) -> None:
    federation = Federation(tmp_path, timeout_s=0.01)
    federation.train(Opening(1, BOTH, STALE), federation.push("ann", 1))
    federation.clients.committed(1)
    with pytest.raises(
        RoundError,
        match=r"0 of 2 clients reported within 0.01 s, all are needed; missing: ann \(stage 0, 1\) .*; "
        r"bob \(stage 0, 1, since round 1\) was never heard",
    ):
        federation.train(Opening(2, ("ann",), closing(), late={"bob": 1}))


def test_an_update_is_discounted_when_it_is_asked_for() -> None:
    tensors = {"weight": torch.tensor([2.0]), "count": torch.tensor(3), "flag": torch.tensor(True)}
    whole = ClientUpdate("ann", 1, tensors, ())
    half = whole.discounted(0.5)
    assert {name: tensor.tolist() for name, tensor in half.items()} == {
        "weight": [1.0],
        "count": 3,
        "flag": True,
    }
    assert whole.discounted(1.0) is whole
