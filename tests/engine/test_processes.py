"""The processes of devices: their ends are noticed, and a spare one becomes the device that is lost next."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
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


def test_the_end_of_a_device_is_told_at_once() -> None:
    ended = threading.Event()
    processes = DeviceProcesses(with_spare=False, on_end=ended.set)
    first, second = (processes.start(f"fedmp c0/{name}", SPEC) for name in ("d0", "d1"))
    assert not ended.is_set()
    first.kill()
    assert ended.wait(10)
    first.join()
    first.close()  # its descriptors may be another's now
    ended.clear()
    second.kill()
    assert ended.wait(10)
    second.join()
    processes.close()


def test_nobody_watches_the_devices_any_more_once_they_are_let_go() -> None:
    before = num_descriptors()
    processes = DeviceProcesses(with_spare=False, on_end=lambda: None)
    device = processes.start("fedmp c0/d0", SPEC)
    processes.close()
    assert "fedmp-sentinels" not in {thread.name for thread in threading.enumerate()}
    device.kill()
    device.join()
    device.close()
    assert num_descriptors() == before


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_without_restarts_there_is_no_spare_process() -> None:
    processes = DeviceProcesses(with_spare=False)
    processes.stand_by()
    assert not [process for process in multiprocessing.active_children() if process.name == "spare device"]
    processes.close()
