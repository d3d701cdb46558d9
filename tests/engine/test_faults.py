"""Devices that die, hang or diverge where nothing heals: the run ends soon, says why, and leaves no process.

`tests/conftest.py` fails every test here that leaves a process behind.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from fedmp import Job
from fedmp.engine.local import LocalEngine
from fedmp.errors import DeadlineError, FederationError, FedmpError, RoundError, TrainingError
from fedmp.records import Event, Progress, RoundStarted
from fedmp.strategy import FedAvg
from tests.support.jobs import run, sgd, tiny_job, topology

# a round that would take hours, so that whatever happens does so in the middle of it
ENDLESS = FedAvg(local_steps=1_000_000)
FRAGILE = LocalEngine(heal=False)
SOON_S = 15.0  # seconds from the fault to the end; a few on an idle machine


def device_process(client: str, device: str) -> multiprocessing.process.BaseProcess:
    name = f"fedmp {client}/{device}"
    return next(process for process in multiprocessing.active_children() if process.name == name)


def send(
    signal_number: int, client: str, device: str, at: type[Event]
) -> tuple[Callable[[Event], None], list[float]]:
    """An observer that sends a device process a signal at the first event of a kind, and notes when."""
    sent: list[float] = []

    def observe(event: Event) -> None:
        if isinstance(event, at) and not sent:
            sent.append(time.monotonic())
            os.kill(device_process(client, device).pid or 0, signal_number)

    return observe, sent


@pytest.mark.parametrize(
    "device", [*(pytest.param(device, marks=pytest.mark.slow) for device in ("d0", "d1")), "d2"]
)
def test_a_device_killed_in_the_middle_of_a_round_ends_the_run_and_is_named(
    device: str, tmp_path: Path
) -> None:
    job = tiny_job(topology=topology(3, 1), strategy=ENDLESS)
    observe, sent = send(signal.SIGKILL, "c0", device, Progress)
    with pytest.raises(
        FederationError, match=rf"device {device} of c0 \(stage \d\) was killed by SIGKILL .*-9"
    ):
        job.run(FRAGILE, run_dir=tmp_path / "run", observe=observe)
    assert time.monotonic() - sent[0] < SOON_S


def test_a_device_killed_while_the_pipeline_comes_up_is_named(tmp_path: Path) -> None:
    observe, sent = send(signal.SIGKILL, "c1", "d1", RoundStarted)
    with pytest.raises(FederationError, match=r"device d1 of c1 .* was killed by SIGKILL"):
        tiny_job(strategy=ENDLESS).run(FRAGILE, run_dir=tmp_path / "run", observe=observe)
    assert time.monotonic() - sent[0] < SOON_S


def test_the_only_device_of_a_client_killed_is_named(tmp_path: Path) -> None:
    observe, _ = send(signal.SIGKILL, "c0", "d0", Progress)
    with pytest.raises(FederationError, match=r"device d0 of c0 .* was killed by SIGKILL"):
        tiny_job(topology=topology(1), strategy=ENDLESS).run(
            FRAGILE, run_dir=tmp_path / "run", observe=observe
        )


def test_a_device_that_hangs_is_noticed_at_the_transfer_deadline(tmp_path: Path) -> None:
    observe, sent = send(signal.SIGSTOP, "c0", "d1", Progress)
    job = tiny_job(topology=topology(2), strategy=ENDLESS)
    with pytest.raises(DeadlineError, match=r"device d0 of c0 \(stage 0\): stage 1 was silent for 2 s"):
        job.run(LocalEngine(heal=False, transfer_timeout_s=2), run_dir=tmp_path / "run", observe=observe)
    assert time.monotonic() - sent[0] < 2 + SOON_S


def test_a_round_that_takes_too_long_says_who_is_missing(tmp_path: Path) -> None:
    job = tiny_job(topology=topology(2, 1), strategy=ENDLESS)
    engine = LocalEngine(round_timeout_s=3)
    with pytest.raises(
        RoundError, match=r"0 of 2 clients reported within 3 s.*c0 \(stage 0, 1\).*c1 \(stage 0\)"
    ):
        run(job, tmp_path / "run", engine)


@pytest.mark.parametrize("engine", ["simulate", "local"])
def test_a_loss_that_is_not_finite_names_client_stage_and_round(engine: str, tmp_path: Path) -> None:
    job = tiny_job(optimizer=sgd(1e30), topology=topology(2), strategy=ENDLESS)
    stage = {"simulate": 0, "local": 1}[engine]  # the simulator runs the model as one stage
    with pytest.raises(
        TrainingError, match=rf"the loss is (nan|inf) at client c0, stage {stage}, round 1"
    ) as error:
        run(job, tmp_path / "run", engine)
    assert "optimizer.lr" in str(error.value)


@pytest.mark.parametrize("engine", ["simulate", "local"])
def test_weights_that_the_last_step_of_a_round_made_infinite_are_noticed(engine: str, tmp_path: Path) -> None:
    """No loss has seen them yet, and an update of them would spoil the global model."""
    job = tiny_job(optimizer=_to_infinity, topology=topology(2), strategy=FedAvg(local_steps=1))
    with pytest.raises(TrainingError, match=r"not finite any more at client c0, stage \d, after round 1"):
        run(job, tmp_path / "run", engine)


def test_an_error_inside_a_device_reaches_the_user_with_its_name(tmp_path: Path) -> None:
    job = tiny_job(topology=topology(2), optimizer=_broken_in_a_device)
    with pytest.raises(FedmpError, match=r"device d\d of c0 \(stage \d\): RuntimeError: no such luck"):
        run(job, tmp_path / "run", "local")


def test_a_keyboard_interrupt_passes_and_stops_every_device(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_job(strategy=ENDLESS).run("local", run_dir=tmp_path / "run", observe=interrupt)
    assert not [process for process in multiprocessing.active_children() if process.name.startswith("fedmp")]


def test_a_keyboard_interrupt_ends_a_long_round_of_clients_trained_at_once(tmp_path: Path) -> None:
    job = tiny_job(strategy=FedAvg(local_steps=100_000))

    def interrupt(event: Event) -> None:
        if isinstance(event, RoundStarted):
            signal.setitimer(signal.ITIMER_REAL, 3)  # by then the steps are under way

    def raise_interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_interrupt)
    started_s = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            job.run("simulate", run_dir=tmp_path / "run", observe=interrupt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started_s < SOON_S


def test_a_run_after_a_failed_one_works(tmp_path: Path) -> None:
    """The fork server that the failed run used is the next one's too."""
    observe, _ = send(signal.SIGKILL, "c0", "d0", RoundStarted)
    with pytest.raises(FederationError):
        tiny_job(topology=topology(2), rounds=1).run(FRAGILE, run_dir=tmp_path / "run", observe=observe)
    result = run(tiny_job(topology=topology(2), rounds=1), tmp_path / "run", "local")
    assert [record.round for record in result.history] == [1]


@pytest.mark.slow
def test_devices_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Killed, the parent cannot tell anyone, but its devices notice."""
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    parent = context.Process(
        target=_run_until_killed, args=(tiny_job(strategy=ENDLESS), tmp_path / "run", tell)
    )
    parent.start()
    assert told.poll(60), "the run did not start"
    devices = [psutil.Process(pid) for pid in told.recv()]
    assert len(devices) == 4
    parent.kill()
    parent.join()
    told.close()
    tell.close()
    _, alive = psutil.wait_procs(devices, timeout=20)
    for process in alive:
        process.kill()
    assert not alive


def _run_until_killed(job: Job, run_dir: Path, tell: multiprocessing.connection.Connection) -> None:
    def observe(event: Event) -> None:
        if isinstance(event, Progress):
            tell.send([p.pid for p in multiprocessing.active_children() if p.name.startswith("fedmp")])

    job.run("local", run_dir=run_dir, observe=observe)


class _Exploding(torch.optim.SGD):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.fill_(float("inf"))


_to_infinity = partial(_Exploding, lr=0.1)


class _Broken(torch.optim.SGD):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        if multiprocessing.current_process().name.startswith("fedmp"):
            raise RuntimeError("no such luck")


_broken_in_a_device = partial(_Broken, lr=0.1)
