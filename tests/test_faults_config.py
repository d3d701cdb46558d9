"""Faults in a job: checked where they come in."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedmp.cli import main
from fedmp.errors import ConfigError
from fedmp.records import Fault
from tests.support.jobs import tiny_job

FINE: dict[str, Any] = {"device": "c0/d1", "round": 1, "phase": "send", "kind": "kill"}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (
            {"kind": "drop", "phase": "forward"},
            "'drop' happens to messages: use phase send or push, not forward",
        ),
        ({"kind": "delay"}, "a delay needs delay_s above 0"),
        ({"delay_s": 1.0}, "nothing else has one"),
        ({"phase": "push", "microbatch": 1}, "phase push has no micro-batches"),
        ({"round": 0}, "greater than or equal to 1"),
        ({"device": "d1"}, "match pattern"),
        ({"when": 3}, "not permitted"),
    ],
)
def test_a_fault_that_cannot_happen_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Fault(**{**FINE, **wrong})


def test_a_job_refuses_a_fault_of_an_unknown_device() -> None:
    with pytest.raises(ConfigError, match=r"no device is called 'c0/d7'; did you mean c0/d"):
        tiny_job(faults=(Fault(**{**FINE, "device": "c0/d7"}),))


def test_a_job_refuses_a_fault_at_a_micro_batch_that_never_comes() -> None:
    with pytest.raises(ConfigError, match="micro-batch 3 of c0/d1 never comes; there are 3, counted from 0"):
        tiny_job(faults=(Fault(**FINE, microbatch=3),))


def test_the_command_line_takes_faults_and_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "faults=[{device: lab-a/d9, round: 2, phase: forward, kind: kill}]"]) == 2
    assert "no device is called 'lab-a/d9'" in capsys.readouterr().err
    assert main(["run", "faults=[{device: lab-a/d0, round: 2, phase: lunch, kind: kill}]"]) == 2
    assert "faults.0.phase is 'lunch'" in capsys.readouterr().err


def test_the_simulator_has_no_processes_to_kill(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="use engine=local"):
        tiny_job(faults=(Fault(**FINE),)).run("simulate", run_dir=tmp_path / "run")
