"""What a device makes of the coordinator's answers."""

from __future__ import annotations

import pytest

from fedmp.client import OTHER_PLAN, DeviceSpec
from fedmp.client.device import serve_job
from fedmp.engine.client_plan import part_of
from fedmp.engine.prepare import prepare
from fedmp.errors import RefusedError
from fedmp.records import FailureReport, Instruction, Joined, Ready
from tests.support.jobs import tiny_job, topology


class Replanning:
    """A coordinator that asks who is there just when the client's model is cut anew."""

    def __init__(self, reason: str) -> None:
        self.reason, self.plans, self.failures = reason, iter(("old", "new")), list[FailureReport]()

    def instruction(self, process: str = "") -> Instruction:
        return Instruction(kind="join", plan=next(self.plans))

    def ready(self, message: Ready) -> Joined:
        raise RefusedError("not so", status=409, reason=self.reason)

    def beat(self) -> None:
        pass

    def fail(self, report: FailureReport) -> None:
        self.failures.append(report)


def spec() -> DeviceSpec:
    job = tiny_job(topology=topology(1))
    setup = prepare(job).clients["c0"]
    return DeviceSpec(
        url="",
        token="",
        client="c0",
        device="d0",
        rank=0,
        placement=setup.plan.placement,
        blueprints=tuple(setup.blueprints),
        dataset=part_of(setup.own_samples, setup.blueprints),
        num_samples=len(setup.own_samples),
        task=job.task,
        work=setup.work,
        num_threads=0,
        ready=Ready(job="j", plan="old"),
        plan="old",
    )


def test_a_device_that_joins_a_plan_that_is_no_more_hears_of_the_next_one() -> None:
    coordinator = Replanning(OTHER_PLAN)
    last = serve_job(spec(), coordinator)  # type: ignore[arg-type]
    assert (last.kind, last.plan) == ("join", "new")
    assert not coordinator.failures


def test_a_device_that_may_not_join_gives_up_and_says_why() -> None:
    coordinator = Replanning("disagreement")
    with pytest.raises(RefusedError, match="not so"):
        serve_job(spec(), coordinator)  # type: ignore[arg-type]
    assert [report.kind for report in coordinator.failures] == ["RefusedError"]
