"""Availability: hours of the day, and traces of recorded devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedmp.clock import Always, Clock, Hours, Trace, Window
from fedmp.errors import ConfigError

HOUR_S, DAY_S = 3600.0, 86_400.0


@pytest.mark.parametrize(
    ("time_h", "start_h", "stop_h"),
    [
        (0.0, -2.0, 6.0),
        (5.9, -2.0, 6.0),
        (6.0, 22.0, 30.0),
        (12.0, 22.0, 30.0),
        (23.0, 22.0, 30.0),
        (50.0, 46.0, 54.0),
    ],
)
def test_a_night_is_from_evening_to_morning(time_h: float, start_h: float, stop_h: float) -> None:
    night = Hours(start_h=22, stop_h=6)
    assert night.window("c", time_h * HOUR_S, seed=0) == Window(start_h * HOUR_S, stop_h * HOUR_S)


def test_a_spread_moves_each_clients_day_its_own_way() -> None:
    hours = Hours(start_h=22, stop_h=6, spread_h=4)
    starts = {hours.window(f"c{index}", 12 * HOUR_S, seed=0).start_s / HOUR_S for index in range(50)}  # type: ignore[union-attr]
    assert len(starts) == 50
    assert min(starts) >= 22
    assert max(starts) <= 26
    assert hours.window("c1", 0.0, seed=0) == hours.window("c1", 0.0, seed=0)


def test_hours_of_no_length_are_refused() -> None:
    with pytest.raises(ValidationError, match="the hours from 6 to 6 are none"):
        Hours(start_h=6, stop_h=6)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([[[10, 20], [40, 50]]]))
    return path


@pytest.mark.parametrize(
    ("time_s", "window"), [(0, (10, 20)), (19, (10, 20)), (20, (40, 50)), (45, (40, 50)), (50, None)]
)
def test_a_trace_has_its_windows_and_then_ends(
    trace: Path, time_s: float, window: tuple[int, int] | None
) -> None:
    assert Trace(path=trace).window("c", time_s, seed=0) == window


@pytest.mark.parametrize(
    ("time_s", "window"), [(50, (110, 120)), (99, (110, 120)), (130, (140, 150)), (250, (310, 320))]
)
def test_a_trace_with_a_period_begins_again(trace: Path, time_s: float, window: tuple[int, int]) -> None:
    assert Trace(path=trace, period_s=100).window("c", time_s, seed=0) == window


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "should hold"),
        ("{}", "without any time"),
        ("[[[1, 2]], []]", "without any time"),
        ("[[[5, 2]]]", "must increase"),
        ("[[[1, 3], [2, 5]]]", "must increase"),
        ("[[1, 2]]", "should hold"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Trace(path=path).window("c", 0.0, seed=0)


def test_a_clock_takes_any_availability_and_nothing_else() -> None:
    class Never:
        def window(self, client: str, time_s: float, *, seed: int) -> Window | None:
            return None

    assert Clock(availability=Never()).availability.window("c", 0.0, seed=0) is None
    assert Clock().availability == Always()
    with pytest.raises(ValidationError, match="availability"):
        Clock(availability=3)
