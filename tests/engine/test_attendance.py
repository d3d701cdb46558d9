"""Deployed clients that heal: devices stay away, come back, come late; the rounds go on.

A client that holds the round open, by a delay in its own devices, gives the others time to come and go.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmp import Job
from fedmp.data import TrainTest
from fedmp.errors import DataError
from fedmp.models import MLP
from fedmp.records import Fault
from fedmp.report import RunDirectory
from fedmp.strategy import FedAvg
from tests.support.deployment import Deployment, ends, eventually
from tests.support.jobs import assert_same, images, run, tiny_job, topology, weights

JOB = tiny_job(
    model=partial(MLP, 784, (16, 14, 12)),
    topology=topology(3, 1),
    data=images(60),
    rounds=3,
    strategy=FedAvg(local_steps=2),
)
SOON = {"absence_s": 3.0, "wait_s": 60.0}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Whatever the plans, the model is the same but for the order in which floats are summed."""
    return weights(run(JOB, tmp_path_factory.mktemp("expected"), "simulate"))


def close(federation: Deployment, expected: dict[str, torch.Tensor]) -> None:
    assert_same(federation.final_state(), expected, rtol=1e-5, atol=1e-6)


def dies(device: str = "c0/d1", **fields: Any) -> Fault:
    return Fault(**{"device": device, "round": 2, "kind": "kill", "phase": "forward", **fields})


def slow(job: Job, *rounds: int, seconds: float = 4.0) -> Job:
    """The job with a client that takes its time in these rounds."""
    late = [Fault(device="c1/d0", round=n, phase="pull", kind="delay", delay_s=seconds) for n in rounds]
    return replace(job, faults=tuple(late))


def tells(federation: Deployment, words: str, *, within_s: float = 40.0) -> None:
    """Wait until the coordinator says so."""
    with eventually(within_s) as waiting:
        while waiting():
            if any(words in note for note in federation.notes()):
                return


def test_a_client_goes_on_without_a_device_that_stays_away(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    with Deployment(tmp_path, JOB, engine=SOON) as federation:
        others = [federation.device("c0", "d0"), federation.device("c0", "d2"), federation.device("c1", "d0")]
        doomed = federation.device("c0", "d1", job=replace(JOB, faults=(dies(),)))
        coordinator = federation.coordinator()
        assert ends(doomed) == -signal.SIGKILL
        assert [ends(process) for process in (coordinator, *others)] == [0] * 4
        close(federation, expected)
        rows = RunDirectory.create(tmp_path / "run").read_metrics()
        assert [row.clients for row in rows] == [("c0", "c1")] * 3
        assert [row.faults for row in rows] == [0, 1, 0]
        tells(federation, "c0 is without d1 (silent for 3 s); it goes on over d0, d2")


@pytest.mark.slow
def test_a_device_that_comes_back_is_given_stages_again_in_the_next_round(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    job = slow(JOB, 2, seconds=15.0)
    with Deployment(tmp_path, job, engine=SOON) as federation:
        others = [federation.device("c0", "d0"), federation.device("c0", "d2"), federation.device("c1", "d0")]
        doomed = federation.device("c0", "d1", job=replace(JOB, faults=(dies(),)))
        coordinator = federation.coordinator()
        assert ends(doomed) == -signal.SIGKILL
        tells(federation, "it goes on over d0, d2")
        back = federation.device("c0", "d1")
        assert [ends(process) for process in (coordinator, back, *others)] == [0] * 5
        close(federation, expected)
        tells(federation, "c0 goes on over d0, d1, d2")
        assert not (tmp_path / "run" / "journal" / "plans.json").read_text().count('"d0"')


@pytest.mark.slow
def test_a_device_may_join_a_job_that_runs_already(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    job = slow(JOB, 1, seconds=20.0)
    with Deployment(tmp_path, job, engine={"absence_s": 3.0, "wait_s": 5.0}) as federation:
        first = [federation.device("c0", "d0"), federation.device("c0", "d2"), federation.device("c1", "d0")]
        coordinator = federation.coordinator()
        tells(federation, "c0 is without d1 (not heard in 5 s); it goes on over d0, d2")
        late = federation.device("c0", "d1")
        assert [ends(process) for process in (coordinator, late, *first)] == [0] * 5
        close(federation, expected)
        tells(federation, "c0 goes on over d0, d1, d2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "nth"),
    [
        ("after an update is in the journal, before it is acknowledged", 7),  # one of the new plan's
        ("after a stage is written for a device", 9),
        ("before the commit", 2),
        ("after the commit", 2),
    ],
)
def test_a_coordinator_killed_in_a_round_of_a_new_plan_goes_on_with_it(
    step: str, nth: int, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    with Deployment(tmp_path, JOB, engine=SOON) as federation:
        others = [federation.device("c0", "d0"), federation.device("c0", "d2"), federation.device("c1", "d0")]
        doomed = federation.device("c0", "d1", job=replace(JOB, faults=(dies(),)))
        coordinator = federation.coordinator(kill_at=step, nth=nth)
        assert ends(doomed) == -signal.SIGKILL
        assert ends(coordinator) == -signal.SIGKILL
        tells(federation, "it goes on over d0, d2")
        again = federation.coordinator()
        assert [ends(process) for process in (again, *others)] == [0] * 4
        close(federation, expected)
        losses = [note for note in federation.notes() if "c0 is without" in note]
        assert len(losses) == 1, "the new plan was remembered, not made again"


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["meet", "pull", "forward", "backward", "push"])
def test_a_second_device_may_be_lost_under_the_new_plan(
    phase: str, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    second = tuple(dies("c0/d2", phase=phase, attempt=attempt) for attempt in (2, 3, 4))
    with Deployment(tmp_path, JOB, engine=SOON) as federation:
        others = [federation.device("c0", "d0"), federation.device("c1", "d0")]
        doomed = [
            federation.device("c0", "d1", job=replace(JOB, faults=(dies(),))),
            federation.device("c0", "d2", job=replace(JOB, faults=second)),
        ]
        coordinator = federation.coordinator()
        assert [ends(process) for process in doomed] == [-signal.SIGKILL] * 2
        assert [ends(process) for process in (coordinator, *others)] == [0] * 3
        close(federation, expected)
        tells(federation, "it goes on over d0")


@pytest.mark.slow
def test_a_device_that_hangs_is_lost_and_comes_back_when_it_goes_on(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    job = slow(JOB, 2, seconds=20.0)
    with Deployment(tmp_path, job, engine=SOON, settings={"transfer_timeout_s": 4}) as federation:
        others = [federation.device("c0", "d0"), federation.device("c0", "d2"), federation.device("c1", "d0")]
        hanging = federation.device("c0", "d1", job=replace(JOB, faults=(dies(kind="stop"),)))
        coordinator = federation.coordinator()
        tells(federation, "it goes on over d0, d2")
        os.kill(hanging.pid or 0, signal.SIGCONT)
        assert [ends(process) for process in (coordinator, hanging, *others)] == [0] * 5
        close(federation, expected)
        tells(federation, "c0 goes on over d0, d1, d2")


@pytest.mark.slow
def test_a_client_without_devices_sits_out_and_comes_back(tmp_path: Path) -> None:
    job = replace(JOB, topology=topology(1, 1), rounds=4, strategy=FedAvg(local_steps=2, min_clients=1))
    slow_job = slow(job, 3, seconds=12.0)
    with Deployment(tmp_path, slow_job, engine=SOON) as federation:
        other = federation.device("c1", "d0")
        doomed = federation.device("c0", "d0", job=replace(job, faults=(dies("c0/d0"),)))
        coordinator = federation.coordinator()
        assert ends(doomed) == -signal.SIGKILL
        tells(federation, "c0 is without d0 (silent for 3 s), and no device is left")
        back = federation.device("c0", "d0")
        assert [ends(process) for process in (coordinator, other, back)] == [0] * 3
        rows = RunDirectory.create(tmp_path / "run").read_metrics()
        assert rows[1].sat_out == ("c0",)
        assert rows[3].clients == ("c0", "c1")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [("c0",), ("c0", "c1")])
def test_clients_that_a_round_cannot_do_without_end_it_and_it_can_be_resumed(
    lost: tuple[str, ...], tmp_path: Path
) -> None:
    job = replace(JOB, topology=topology(1, 1))
    expected = weights(run(job, tmp_path / "expected", "local"))
    with Deployment(tmp_path, job, engine={**SOON, "stranded_s": 2.0}) as federation:
        coordinator = federation.coordinator()
        devices = {
            client: federation.device(
                client, "d0", job=replace(job, faults=(dies(f"{client}/d0"),) if client in lost else ())
            )
            for client in ("c0", "c1")
        }
        assert [ends(devices[client]) for client in lost] == [-signal.SIGKILL] * len(lost)
        assert ends(coordinator) == 2
        why = (tmp_path / "coordinator.error").read_text()
        assert "all are needed" in why
        assert "is without d0 (silent for" in why
        again = federation.coordinator()  # the devices that are left have waited for it
        back = [federation.device(client, "d0") for client in lost]
        left = [device for client, device in devices.items() if client not in lost]
        assert [ends(process) for process in (again, *back, *left)] == [0] * 3
        assert_same(federation.final_state(), expected)


@pytest.mark.parametrize(
    ("step", "nth"),
    [
        ("before the commit", 2),
        pytest.param("before the journal is opened", 2, marks=pytest.mark.slow),
        pytest.param("before an update is checked", 4, marks=pytest.mark.slow),
    ],
)
def test_a_coordinator_whose_disk_is_full_ends_and_goes_on_when_there_is_room(
    step: str, nth: int, tmp_path: Path
) -> None:
    """Uploads that do not fit are tried again; what cannot be committed ends the coordinator alone."""
    job = replace(JOB, topology=topology(1, 1), rounds=2)
    expected = weights(run(job, tmp_path / "expected", "local"))
    with Deployment(tmp_path, job, engine={**SOON, "round_timeout_s": 15.0}) as federation:
        devices = federation.devices()
        assert ends(federation.coordinator(fill_at=step, nth=nth)) == 2
        why = (tmp_path / "coordinator.error").read_text()
        assert "File too large" in why or "clients reported within 15 s" in why
        again = federation.coordinator()
        assert [ends(process) for process in (again, *devices)] == [0] * 3
        assert_same(federation.final_state(), expected)


@pytest.mark.slow
def test_a_device_whose_process_fails_is_one_that_is_lost(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    """Out of memory, say: nobody else's run ends with it."""
    with Deployment(tmp_path, JOB, engine=SOON) as federation:
        others = [federation.device("c0", "d0"), federation.device("c0", "d2"), federation.device("c1", "d0")]
        broken = federation.device("c0", "d1", job=replace(JOB, optimizer=partial(_Broken, lr=0.05)))
        coordinator = federation.coordinator()
        assert ends(broken) == 2
        assert "RuntimeError: no such luck" in federation.last_words("c0", "d1")
        assert [ends(process) for process in (coordinator, *others)] == [0] * 4
        close(federation, expected)


@pytest.mark.slow
def test_a_device_that_has_no_data_for_its_new_place_is_left_out(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    """The one in the middle needs none, until the first is lost and it is to take its place."""
    blind = replace(JOB, data=_Nothing())
    with Deployment(tmp_path, JOB, engine=SOON) as federation:
        others = [
            federation.device("c0", "d1", job=blind),
            federation.device("c0", "d2"),
            federation.device("c1", "d0"),
        ]
        doomed = federation.device("c0", "d0", job=replace(JOB, faults=(dies("c0/d0"),)))
        coordinator = federation.coordinator()
        assert ends(doomed) == -signal.SIGKILL
        assert [ends(process) for process in (coordinator, *others)] == [0] * 4
        close(federation, expected)
        tells(federation, "c0 is without d1 (nothing is here); it goes on over d2")


class _Nothing:
    """A data source on a machine that has no data."""

    def load(self) -> TrainTest:
        raise DataError("nothing is here")


class _Broken(torch.optim.SGD):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        raise RuntimeError("no such luck")
