"""The measured time line of a step: as a Chrome trace, and as shares of the time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmp.records import TimedAction
from fedmp.report import format_shares, time_shares, write_chrome_trace
from fedmp.schedule import OneFOneB
from tests.pipeline.harness import cut, make_runners, own_stages, traced, train
from tests.support.models import CASES

STEP = [
    TimedAction("a", 0, "forward", 0, 1.0, 1.4),
    TimedAction("a", 0, "send", 0, 1.4, 1.5),
    TimedAction("b", 1, "wait", 0, 1.0, 1.5),
    TimedAction("b", 1, "forward", 0, 1.5, 2.0),
]


def test_shares_of_a_step_add_up_and_stand_next_to_the_plan() -> None:
    first, second = time_shares(STEP, {"a": 0.5, "b": 0.5})
    assert (first.compute, first.communication, first.bubble) == pytest.approx((0.4, 0.1, 0.5))
    assert (second.compute, second.communication, second.bubble) == pytest.approx((0.5, 0.0, 0.5))
    assert second.predicted_bubble == 0.5
    assert "planned bubble" in format_shares([first, second])


def test_a_chrome_trace_has_every_action_with_its_time(tmp_path: Path) -> None:
    write_chrome_trace(STEP, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert named == ["a", "b"]
    last = events[-1]
    assert (last["name"], last["pid"], last["tid"], last["ts"], last["dur"]) == ("forward 0", 1, 1, 5e5, 5e5)


def test_every_action_of_a_real_step_is_observed() -> None:
    model, graph = traced("mlp")
    runners = make_runners(own_stages(model, graph, 2))
    seen: list[TimedAction] = []
    for runner in runners:
        runner.observe = seen.append
    train(runners, cut(CASES["mlp"][1](4, 0), 4), OneFOneB())
    for stage in (0, 1):
        for kind in ("forward", "backward"):
            found = sorted(a.microbatch for a in seen if a.stage == stage and a.kind == kind)
            assert found == [0, 1, 2, 3]
