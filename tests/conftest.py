"""For every test: real data sets where they exist, and a check that nothing is left running."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# Python's own helpers, which live as long as the process that needed them first
_HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


def pytest_configure() -> None:
    """Point `FEDMP_DATA_DIR` at a folder of data sets beside the checkout, where there is one."""
    beside = REPOSITORY.parent / "shared" / "data"
    if beside.is_dir():
        os.environ.setdefault("FEDMP_DATA_DIR", str(beside))
    if os.environ.get("PYTHONPATH"):  # tests that change the folder start processes that need it too
        paths = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in paths)


@pytest.fixture
def data_dir() -> Path:
    """A folder of real data sets; skips the test where there is none."""
    folder = Path(os.environ.get("FEDMP_DATA_DIR", ""))
    if "FEDMP_DATA_DIR" not in os.environ or not folder.is_dir():
        pytest.skip("needs real data sets: set FEDMP_DATA_DIR to a folder that has them")
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a child process, a thread that is no daemon, or a listening socket."""
    threads, processes, sockets = _threads(), _processes(), _listening()
    yield
    left = [f"thread {thread.name!r}" for thread in _threads() - threads]
    new = _processes() - processes
    if new:
        _, alive = psutil.wait_procs(list(new), timeout=3)
        left += [f"process {process.pid}" for process in alive]
    if _listening() - sockets:
        gc.collect()
        left += [f"socket that listens on {address}" for address in _listening() - sockets]
    assert not left, f"the test left behind: {', '.join(left)}"


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.daemon}


def _processes() -> set[psutil.Process]:
    found = set()
    for child in psutil.Process().children():
        if _is_helper(child):
            found |= set(child.children(recursive=True))
        else:
            found |= {child, *child.children(recursive=True)}
    return found


def _is_helper(process: psutil.Process) -> bool:
    try:
        return any(name in " ".join(process.cmdline()) for name in _HELPERS)
    except psutil.NoSuchProcess:
        return True


def _listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("tcp")
    return {tuple(entry.laddr) for entry in connections if entry.status == psutil.CONN_LISTEN}
