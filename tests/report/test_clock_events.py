"""The event log of simulated time and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmp.records import ClockEvent, RoundTimed, rounds_of
from fedmp.report.pictures import draw_clock
from fedmp.report.run_directory import RunDirectory

ROUND = RoundTimed(
    1,
    0.0,
    (
        ClockEvent(0.0, "a", "", "begins"),
        ClockEvent(0.0, "b", "", "begins"),
        ClockEvent(1.0, "a", "d0", "pulled"),
        ClockEvent(1.0, "b", "d0", "pulled"),
        ClockEvent(2.0, "b", "", "lost"),
        ClockEvent(4.0, "a", "", "trained"),
        ClockEvent(5.0, "a", "d0", "pushed"),
        ClockEvent(5.0, "a", "", "arrived"),
        ClockEvent(5.0, "", "", "closed"),
    ),
)


def shifted(round: int, start_s: float) -> RoundTimed:
    return RoundTimed(round, start_s, ROUND.events)


def test_a_line_tells_time_client_device_and_what() -> None:
    lines = shifted(3, 100.0).lines().splitlines()
    assert json.loads(lines[2]) == {
        "round": 3,
        "time_s": 101.0,
        "client": "a",
        "device": "d0",
        "what": "pulled",
    }


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    rounds = (ROUND, shifted(2, 5.0), shifted(3, 10.0))
    for timed in rounds:
        directory.append_events(timed)
    assert directory.read_events() == rounds
    directory.truncate_events(2)
    assert directory.read_events() == rounds[:2]
    directory.truncate_events(0)
    assert directory.read_events() == ()


def test_a_torn_line_is_left_out() -> None:
    text = ROUND.lines()
    (timed,) = rounds_of(text[:-20].splitlines())
    assert timed.events == ROUND.events[:-1]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_first_rounds_are_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clock{suffix}"
    draw_clock([shifted(number, 5.0 * number) for number in range(1, 9)], path)
    assert path.stat().st_size > 1000
    if suffix == ".svg":
        assert "rounds 1 to 4 of 8" in path.read_text()
        assert "drops out" in path.read_text()


def test_many_clients_are_drawn_in_part(tmp_path: Path) -> None:
    events = tuple(ClockEvent(0.0, f"c{number}", "", "begins") for number in range(50))
    draw_clock([RoundTimed(1, 0.0, events)], tmp_path / "clock.svg")
    assert "30 of 50 clients" in (tmp_path / "clock.svg").read_text()
