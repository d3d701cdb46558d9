"""The roll of a round: who trains from which round's model, who is late, who begins in whose place."""

from __future__ import annotations

from fedmp.coordinator import Board
from tests.support.service import members

MEMBERS = members()


def report(board: Board, client: str, round: int) -> list[bool]:
    return [board.reported(MEMBERS[f"{client}{stage}"], round, 5) for stage in (0, 1)]


def told(board: Board, device: str) -> tuple[str, int]:
    instruction = board.instruction_for(MEMBERS[device])
    return instruction.kind, instruction.round


def test_a_round_may_close_with_those_who_are_wanted() -> None:
    board = Board(MEMBERS)
    board.open_round(3, ("ann", "bob"), wanted=1)
    assert board.wait_for_cohort(timeout_s=0) is False
    report(board, "bob", 3)
    assert board.wait_for_cohort(timeout_s=0) is True
    assert board.finished() == ("bob",)


def test_clients_are_finished_in_the_order_in_which_they_were_complete() -> None:
    board = Board(MEMBERS)
    board.open_round(3, ("ann", "bob"))
    board.reported(MEMBERS["ann0"], 3, 5)
    report(board, "bob", 3)
    board.reported(MEMBERS["ann1"], 3, 5)
    assert board.finished() == ("bob", "ann")


def test_a_late_client_goes_on_with_its_own_round() -> None:
    board = Board(MEMBERS)
    board.open_round(3, ("ann", "bob"))
    report(board, "ann", 3)
    assert board.close_round(("ann",), oldest=1) == {"bob": 3}
    board.open_round(4, ("ann",), late={"bob": 3})
    assert told(board, "ann0") == ("train", 4)
    assert told(board, "bob0") == ("train", 3)
    assert board.status().num_late == 1
    assert board.window(3, "bob") == "open"
    assert board.window(4, "bob") == "not in cohort"
    assert board.window(3, "ann") == "over"
    assert report(board, "bob", 4) == [False, False]
    assert report(board, "bob", 3) == [True, True]
    assert board.finished() == ("bob",)


def test_a_late_update_is_taken_while_the_coordinator_aggregates_and_counts_in_the_next_round() -> None:
    board = Board(MEMBERS)
    board.open_round(3, ("ann", "bob"))
    report(board, "ann", 3)
    board.close_round(("ann",), oldest=1)
    assert told(board, "bob0")[0] == "wait"
    assert board.window(3, "bob") == "open"
    assert report(board, "bob", 3) == [True, True]
    board.open_round(4, ("ann",), late={"bob": 3})
    assert board.finished() == ("bob",)


def test_without_staleness_a_late_client_is_told_that_its_round_is_over() -> None:
    board = Board(MEMBERS)
    board.open_round(3, ("ann", "bob"))
    report(board, "ann", 3)
    assert board.close_round(("ann",)) == {}
    assert board.window(3, "bob") == "over"
    assert report(board, "bob", 3) == [False, False]


def test_a_client_that_is_too_late_or_gave_up_does_not_go_on() -> None:
    board = Board(MEMBERS)
    board.open_round(5, ("ann",), late={"bob": 3})
    assert board.close_round(oldest=4) == {"ann": 5}
    board.open_round(5, ("ann",), late={"bob": 3})
    board.give_up("ann", "no device is left")
    assert board.close_round(oldest=1) == {"bob": 3}


def test_a_spare_client_begins_when_another_is_done() -> None:
    board = Board(MEMBERS)
    board.open_round(1, ("ann",), spare=("bob",))
    assert told(board, "bob0")[0] == "wait"
    report(board, "ann", 1)
    assert told(board, "bob0") == ("train", 1)
    assert board.training() == {"ann": 1, "bob": 1}


def test_nobody_begins_any_more_when_as_many_are_done_as_are_wanted() -> None:
    board = Board(MEMBERS)
    board.open_round(1, ("ann",), spare=("bob",), wanted=1)
    report(board, "ann", 1)
    assert board.training() == {"ann": 1}


def test_a_spare_client_begins_in_the_place_of_one_that_gives_up() -> None:
    board = Board(MEMBERS)
    board.open_round(1, ("ann",), spare=("bob",))
    board.give_up("ann", "no device is left")
    assert told(board, "bob0") == ("train", 1)


def test_after_a_restart_as_many_spare_clients_have_begun_as_before() -> None:
    board = Board(MEMBERS)
    board.open_round(1, ("ann",), {("ann", 0): "", ("ann", 1): ""}, spare=("bob",))
    assert told(board, "bob0") == ("train", 1)
    board.open_round(1, ("ann",), {("ann", 0): ""}, spare=("bob",))
    assert told(board, "bob0")[0] == "wait"


def test_progress_of_a_late_client_is_that_of_its_own_round() -> None:
    from fedmp.records import ProgressReport

    board = Board(MEMBERS)
    board.open_round(4, ("ann",), late={"bob": 3})
    for client, round in (("ann", 3), ("bob", 4)):
        board.progressed(
            MEMBERS[f"{client}1"], ProgressReport(round=round, samples_done=1, samples_total=9, loss=0.5)
        )
    assert board.progress() == {}
    board.progressed(MEMBERS["bob1"], ProgressReport(round=3, samples_done=1, samples_total=9, loss=0.5))
    assert set(board.progress()) == {"bob"}
