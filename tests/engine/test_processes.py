"""The spare process that becomes the next device that is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from fedmp.client import DeviceSpec
from fedmp.engine import processes as module
from fedmp.engine.processes import DeviceProcesses
from fedmp.tasks import CrossEntropy
from tests.support.deployment import eventually

NOTHING: Any = None  # is never looked at: no coordinator answers
SPEC = DeviceSpec(
    url="http://127.0.0.1:9",
    token="",
    client="c0",
    device="d0",
    rank=0,
    placement=((0,),),
    blueprints=(),
    dataset=None,
    num_samples=1,
    task=CrossEntropy(),
    work=NOTHING,
)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceProcesses]:
    monkeypatch.setattr(module, "_SPARE_AFTER_S", 0.0)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fedmp.engine.preload"])
    made = DeviceProcesses(with_spare=True)
    made.stand_by()
    yield made
    made.close()
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def spare_pid() -> int:
    (spare,) = [process for process in multiprocessing.active_children() if process.name == "spare device"]
    assert spare.pid is not None
    return spare.pid


def test_a_device_starts_in_the_spare_process_and_another_one_stands_by(processes: DeviceProcesses) -> None:
    first = spare_pid()
    device = processes.start("fedmp c0/d0", SPEC)
    assert (device.pid, device.name, device.is_alive()) == (first, "fedmp c0/d0", True)
    processes.stand_by()
    assert spare_pid() != first


def test_a_spare_process_that_is_gone_is_no_loss(processes: DeviceProcesses) -> None:
    first = spare_pid()
    os.kill(first, signal.SIGKILL)
    with eventually() as waiting:
        while waiting():
            if first not in {process.pid for process in multiprocessing.active_children()}:
                break
    device = processes.start("fedmp c0/d0", SPEC)
    assert device.pid != first
    assert device.is_alive()


def test_a_spare_process_that_is_not_needed_goes_home(processes: DeviceProcesses) -> None:
    (spare,) = [process for process in multiprocessing.active_children() if process.name == "spare device"]
    os.kill(spare.pid or 0, signal.SIGSTOP)  # even if it hangs
    processes.close()
    assert not [process for process in multiprocessing.active_children() if process.name == "spare device"]


def test_without_restarts_there_is_no_spare_process() -> None:
    processes = DeviceProcesses(with_spare=False)
    processes.stand_by()
    assert not [process for process in multiprocessing.active_children() if process.name == "spare device"]
    processes.close()
