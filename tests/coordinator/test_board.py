"""The notice board between the round loop and the devices."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from fedmp.coordinator import Board
from fedmp.errors import FedmpError, PipelineError, RefusedError, RoundError, TrainingError
from fedmp.records import Address, FailureReport, Ready
from tests.support.service import members

MEMBERS = members()


def opened(*cohort: str, reported: tuple[tuple[str, int], ...] = ()) -> Board:
    board = Board(MEMBERS)
    board.open_round(3, cohort or ("ann", "bob"), dict.fromkeys(reported, ""))
    return board


def report_all(board: Board, client: str) -> None:
    for stage in (0, 1):
        board.reported(MEMBERS[f"{client}{stage}"], 3, 5)


def test_before_the_first_round_devices_wait() -> None:
    instruction = Board(MEMBERS).instruction_for(MEMBERS["ann0"])
    assert (instruction.kind, instruction.reason) == ("wait", "the first round has not begun")


def test_a_device_of_the_cohort_trains_the_open_round() -> None:
    instruction = opened().instruction_for(MEMBERS["bob1"])
    assert (instruction.kind, instruction.round) == ("train", 3)


def test_a_device_outside_the_cohort_waits_and_is_told_why() -> None:
    instruction = opened("ann").instruction_for(MEMBERS["bob1"])
    assert (instruction.kind, instruction.reason) == ("wait", "not in this round's cohort")


def test_a_device_that_has_reported_waits() -> None:
    board = opened(reported=(("ann", 0),))
    assert board.instruction_for(MEMBERS["ann0"]).kind == "wait"
    assert board.instruction_for(MEMBERS["ann1"]).kind == "train"


def test_all_devices_are_sent_home_at_the_end() -> None:
    board = opened("ann")
    board.stop("the job is over")
    assert {board.instruction_for(member).kind for member in MEMBERS.values()} == {"stop"}


def test_the_cohort_is_complete_when_every_stage_of_every_client_has_reported() -> None:
    board = opened()
    report_all(board, "ann")
    board.reported(MEMBERS["bob0"], 3, 5)
    assert board.wait_for_cohort(timeout_s=0) is False
    assert board.missing() == {"bob": [1]}
    board.reported(MEMBERS["bob1"], 3, 5)
    assert board.wait_for_cohort(timeout_s=0) is True
    assert board.bytes_up == 20


def test_a_wait_ends_as_soon_as_the_last_stage_reports() -> None:
    board = opened("ann")
    threading.Thread(target=report_all, args=(board, "ann"), daemon=True).start()
    started_s = time.monotonic()
    assert board.wait_for_cohort(timeout_s=60) is True
    assert time.monotonic() - started_s < 30


def test_a_cause_ends_the_wait_at_once_with_its_own_kind_of_error() -> None:
    board = opened()
    board.failed(MEMBERS["ann0"], FailureReport(kind="TrainingError", message="the loss is nan", round=3))
    with pytest.raises(TrainingError, match="the loss is nan"):
        board.wait_for_cohort(timeout_s=60)


def test_a_cause_is_told_rather_than_the_losses_that_follow_from_it() -> None:
    board = opened()
    board.failed(MEMBERS["ann0"], FailureReport(kind="PipelineError", message="lost stage 1", round=3))
    assert board.wait_for_cohort(timeout_s=0) is False, "the cause has a moment to become known"
    board.failed(MEMBERS["ann0"], FailureReport(kind="TrainingError", message="the loss is nan", round=3))
    board.failed(MEMBERS["ann0"], FailureReport(kind="PipelineError", message="lost stage 0", round=3))
    with pytest.raises(TrainingError, match="the loss is nan"):
        board.wait_for_cohort(timeout_s=0)


def test_a_loss_whose_cause_stays_unknown_is_told_after_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmp.coordinator.board._CAUSE_S", 0.0)
    board = opened()
    board.failed(MEMBERS["ann0"], FailureReport(kind="PipelineError", message="lost stage 1", round=3))
    with pytest.raises(PipelineError, match="lost stage 1"):
        board.wait_for_cohort(timeout_s=60)


@pytest.mark.parametrize("kind", ["Surprise", "ConfigError", "SystemExit", "os.system"])
def test_a_kind_of_failure_that_devices_do_not_have_becomes_a_round_error(kind: str) -> None:
    board = opened()
    board.failed(MEMBERS["ann0"], FailureReport(kind=kind, message="what?", round=3))
    with pytest.raises(RoundError, match=r"what\?") as error:
        board.wait_for_cohort(timeout_s=60)
    assert isinstance(error.value, FedmpError)


def test_it_knows_how_long_a_client_has_been_silent() -> None:
    board = opened()
    assert board.silent_s("ann") is None
    board.heard(MEMBERS["ann1"])
    silent_s = board.silent_s("ann")
    assert silent_s is not None
    assert 0 <= silent_s < 60


def test_listeners_hear_of_every_change() -> None:
    board = opened()
    heard: list[int] = []
    board.listen(lambda: heard.append(1))
    board.reported(MEMBERS["ann0"], 3, 1)
    board.close_round()
    board.stop("over")
    assert len(heard) == 3


def test_a_pipeline_that_comes_up_anew_voids_what_an_earlier_one_began() -> None:
    board = opened()
    first, second = (Address(host="h", port=1, secret=secret) for secret in ("one", "two"))
    assert board.publish_address(MEMBERS["ann0"], first) == []
    assert board.reported(MEMBERS["ann1"], 3, 5, first.generation)
    assert board.publish_address(MEMBERS["ann0"], first) == [], "the same pipeline, after a restart perhaps"
    assert board.publish_address(MEMBERS["ann0"], second) == [1]
    assert board.missing()["ann"] == [0, 1]
    assert not board.reported(MEMBERS["ann0"], 3, 5, first.generation), "too late"


def test_what_a_pipeline_has_finished_stays_when_another_one_comes_up() -> None:
    board = opened()
    report_all(board, "ann")
    assert board.publish_address(MEMBERS["ann0"], Address(host="h", port=1, secret="new")) == []
    assert board.missing() == {"bob": [0, 1]}


def test_devices_join_before_they_train_and_agree_on_their_samples() -> None:
    board = Board(MEMBERS, joins=True)
    board.open_round(1, ("ann", "bob"))
    assert board.instruction_for(MEMBERS["ann0"]).kind == "join"
    assert board.join(MEMBERS["ann1"], Ready(job="j")) is None
    assert board.join(MEMBERS["ann0"], Ready(job="j", num_samples=45)) == 45
    assert board.join(MEMBERS["ann1"], Ready(job="j")) == 45
    assert board.samples_of("bob") is None
    assert board.instruction_for(MEMBERS["ann0"]).kind == "train"
    with pytest.raises(RefusedError, match="ann/d1 holds 44 samples, but ann/d0 holds 45"):
        board.join(MEMBERS["ann1"], Ready(job="j", num_samples=44))


def test_the_end_waits_until_every_device_has_heard_of_it() -> None:
    board = opened()
    board.stop("over", is_last=False)
    for member in MEMBERS.values():
        assert board.wait_until_told(timeout_s=0) is False
        assert board.instruction_for(member).kind == "next"
    assert board.wait_until_told(timeout_s=0) is True


def lost(generation: int = 0) -> FailureReport:
    return FailureReport(kind="PipelineError", message="lost stage 1", round=3, generation=generation)


def healing() -> Board:
    """A board whose clients have three attempts, and have all begun their first."""
    board = Board(MEMBERS, attempts=3)
    board.open_round(3, ("ann", "bob"))
    for name, member in MEMBERS.items():
        assert board.instruction_for(member, name).generation == 0
    return board


def test_a_broken_pipeline_is_brought_up_anew_once_however_many_devices_report_it() -> None:
    board = healing()
    board.failed(MEMBERS["ann0"], lost())
    board.failed(MEMBERS["ann1"], lost())
    told = board.instruction_for(MEMBERS["ann1"])
    assert (told.kind, told.generation, told.attempt) == ("train", 1, 2)
    assert board.instruction_for(MEMBERS["bob0"]).generation == 0
    assert board.recoveries == 1
    assert board.incidents() == ["ann begins round 3 anew: lost stage 1"]


def test_a_client_that_lost_a_device_begins_anew_at_once_and_once_only() -> None:
    board = healing()
    board.lost("ann1 was killed", MEMBERS["ann1"])
    assert board.instruction_for(MEMBERS["ann0"]).generation == 1
    board.failed(MEMBERS["ann0"], lost())  # the neighbour has noticed, too
    assert board.instruction_for(MEMBERS["ann1"], "its successor").generation == 1
    assert board.incidents() == ["ann1 was killed", "ann begins round 3 anew: device d1 was lost"]
    assert (board.faults, board.recoveries) == (1, 1)


def test_a_device_that_was_lost_before_it_came_up_again_costs_no_further_attempt() -> None:
    board = healing()
    board.lost("ann1 was killed", MEMBERS["ann1"])
    board.lost("ann1 was killed", MEMBERS["ann1"])
    assert board.instruction_for(MEMBERS["ann0"]).generation == 1
    assert (board.faults, board.recoveries) == (2, 1)


def test_a_pipeline_that_breaks_off_a_round_which_was_closed_without_it_meets_anew_and_fails_nothing() -> (
    None
):
    board = opened()  # where nothing heals
    board.close_round(["bob"])
    board.failed(MEMBERS["ann0"], lost())
    board.open_round(4, ("ann", "bob"))
    assert board.wait_for_cohort(timeout_s=0) is False
    told = board.instruction_for(MEMBERS["ann0"])
    assert (told.round, told.generation, told.attempt) == (4, 1, 1)


def test_a_nudge_ends_one_wait_before_its_time() -> None:
    board = opened("ann")
    board.nudge()
    started_s = time.monotonic()
    assert board.wait_for_cohort(timeout_s=60) is False
    assert time.monotonic() - started_s < 30
    report_all(board, "ann")
    assert board.wait_for_cohort(timeout_s=60) is True


def test_what_a_broken_pipeline_made_is_void_until_the_next_one_is_up() -> None:
    board = healing()
    first, second = (Address(host="h", port=1, secret=str(n), number=n) for n in (0, 1))
    board.publish_address(MEMBERS["ann0"], first)
    assert board.reported(MEMBERS["ann0"], 3, 5, first.generation)
    board.failed(MEMBERS["ann1"], lost())
    assert not board.reported(MEMBERS["ann1"], 3, 5, first.generation)
    assert board.publish_address(MEMBERS["ann0"], first) == [], "too late"
    assert board.address_of("ann") is None
    assert board.publish_address(MEMBERS["ann0"], second) == [0]
    assert board.reported(MEMBERS["ann1"], 3, 5, second.generation)


def test_a_device_in_another_process_than_before_begins_a_new_generation_unless_it_has_begun() -> None:
    board = healing()
    assert board.instruction_for(MEMBERS["ann1"], "another").generation == 1
    board.failed(MEMBERS["ann0"], lost())
    assert board.instruction_for(MEMBERS["ann0"], "ann0").generation == 1
    board.failed(MEMBERS["ann0"], lost(generation=1))
    assert board.instruction_for(MEMBERS["ann1"], "a third").generation == 2, (
        "the second had not been told of it"
    )


def test_a_client_without_attempts_left_is_given_up_for_the_round() -> None:
    board = healing()
    report_all(board, "bob")
    for generation in range(3):
        assert board.wait_for_cohort(timeout_s=0) is False
        board.failed(MEMBERS["ann0"], lost(generation))
    assert board.given_up() == {"ann": "3 attempts failed, the last one: lost stage 1"}
    assert board.wait_for_cohort(timeout_s=0) is True
    assert board.finished() == ("bob",)
    assert board.instruction_for(MEMBERS["ann0"]).kind == "wait"
    board.open_round(4, ("ann", "bob"))
    assert board.instruction_for(MEMBERS["ann0"]).attempt == 1


def test_a_client_whose_updates_are_in_is_not_planned_anew() -> None:
    board = healing()
    report_all(board, "bob")
    assert board.replace_client("bob", {}) is None
    assert board.replace_client("ann", {}) == {0, 1}
    assert {member.client for member in board.members.values()} == {"bob"}


def test_what_an_earlier_plan_made_does_not_count_for_the_next_one() -> None:
    """Of two devices the first has reported; the new plan has but one, of the same rank."""
    board = healing()
    report_all(board, "bob")
    assert board.reported(MEMBERS["ann0"], 3, 5)
    alone = replace(MEMBERS["ann0"], stages=(0, 1), plan="another")
    assert board.replace_client("ann", {"ann0": alone}) == {0, 1}
    assert board.missing() == {"ann": [0, 1]}
    assert not board.reported(MEMBERS["ann0"], 3, 5), "that device is another one now"
    assert board.reported(alone, 3, 5)
    assert board.wait_for_cohort(timeout_s=0) is True


def test_a_device_of_another_plan_is_told_to_ask_for_the_job_again() -> None:
    planned = {name: replace(member, plan="first") for name, member in MEMBERS.items()}
    board = Board(planned, joins=True)
    board.open_round(1, ("ann", "bob"))
    board.join(planned["ann0"], Ready(job="j", plan="first"))
    again = replace(planned["ann0"], plan="second")
    board.replace_client("ann", {"ann0": again})
    told = board.instruction_for(again)
    assert (told.kind, told.plan) == ("join", "second")
    assert board.instruction_for(planned["ann0"]).kind == "wait", "it asks for a moment as who it was before"
    with pytest.raises(RefusedError, match="the model of ann was cut anew") as refused:
        board.join(again, Ready(job="j", plan="first"))
    assert (refused.value.status, refused.value.reason) == (409, "other-plan")


def test_a_device_that_cannot_take_its_place_waits_until_it_is_started_anew() -> None:
    board = Board(MEMBERS, joins=True)
    board.open_round(1, ("ann", "bob"))
    ready = Ready(job="j", process="one")
    board.join(MEMBERS["ann0"], ready.model_copy(update={"unable": "no data here"}))
    assert board.unable() == {("ann", "d0"): "no data here"}
    assert board.instruction_for(MEMBERS["ann0"]).kind == "wait"
    board.join(MEMBERS["ann0"], ready)
    assert board.unable() == {("ann", "d0"): "no data here"}, "the same process holds what it held"
    board.join(MEMBERS["ann0"], ready.model_copy(update={"process": "two"}))
    assert board.unable() == {}
