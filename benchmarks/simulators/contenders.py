"""Run one contender on one workload, in processes and an environment of its own, and watch what it needs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["CONTENDERS", "Contender", "compile_ours", "environment", "run"]

HERE = Path(__file__).resolve().parent
REQUIREMENTS = {
    "pfl": ["torch", "pfl[pytorch]==0.6.0", "scikit-learn"],
    "flower": ["torch", "flwr[simulation]==1.42.0"],
}


@dataclass(frozen=True)
class Contender:
    """A way to run a workload.

    Attributes:
        script: in this folder.
        rival: whose environment it needs; empty for this one.
        processes: of one program that work together; each other contender is one program with its own threads.
    """

    script: str
    rival: str = ""
    processes: int = 1


CONTENDERS = {
    "fedmp": Contender("fedmp_run.py"),
    "fedmp-2": Contender("fedmp_run.py", processes=2),
    "pfl": Contender("pfl_run.py", "pfl"),
    "pfl-2": Contender("pfl_run.py", "pfl", processes=2),
    "loop": Contender("loop.py"),
    "loop-2": Contender("loop.py", processes=2),
    "flower": Contender("flower_run.py", "flower"),
}


def environment(rival: str, folder: Path) -> str:
    """The interpreter of a rival's environment, which is made if it is not there; ours for no rival."""
    if not rival:
        return sys.executable
    names = {"flower": ("flower", "flwr")}.get(rival, (rival,))
    for name in names:
        if (folder / name / "bin/python").exists():
            return str(folder / name / "bin/python")
    python = folder / rival / "bin/python"
    print(f"making {python.parents[1]}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS[rival]], check=True)
    return str(python)


def compile_ours() -> None:
    """Byte-compile fedmp, as pip does when it installs a package; the rivals' are."""
    import importlib.util

    spec = importlib.util.find_spec("fedmp")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = next(iter(spec.submodule_search_locations))
    subprocess.run([sys.executable, "-m", "compileall", "-q", folder], check=True, env=_environ())


def run(name: str, path: Path, *, environments: Path, logs: Path, timeout_s: float) -> dict[str, Any]:
    """Run a contender.

    Args:
        name: of the contender.
        path: of the workload.
        environments: where those of the rivals are.
        logs: a folder for what it prints.
        timeout_s: after which it is ended.

    Returns:
        Seconds, bytes and accuracy; `failed` says why there are none, or that they are of a part of the run.
    """
    contender = CONTENDERS[name]
    python = environment(contender.rival, environments)
    log = logs / f"{path.stem}-{name}.log"
    born_s = time.time()
    failed = ""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_started(command, environ, log.with_suffix(f".{rank}.log") if rank else log))
            for rank, (command, environ) in enumerate(_commands(contender, python, path, born_s))
        ]
        memory = stack.enter_context(PeakMemory([process.pid for process in processes]))
        try:
            processes[0].wait(timeout_s)
            if processes[0].returncode:
                failed = f"ended with exit code {processes[0].returncode}, see {log}"
        except subprocess.TimeoutExpired:
            failed = f"ended after {timeout_s:.0f} s"
    return _read(log, failed) | {"wall_s": time.time() - born_s, "peak_mb": memory.num_bytes / 1e6}


def _commands(
    contender: Contender, python: str, path: Path, born_s: float
) -> list[tuple[list[str], dict[str, str]]]:
    """The command and the environment of each of a contender's processes."""
    command = [python, str(HERE / contender.script), str(path), str(born_s)]
    if contender.processes == 1:
        return [(command, _environ())]
    port = str(_free_port())
    everyone = ",".join([f"localhost:{port}"] * contender.processes)  # pfl dials the first alone
    group = {"PFL_WORKER_ADDRESSES": everyone}
    if not contender.rival:
        group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(contender.processes)}
    return [
        (command, _environ() | group | {"PFL_WORKER_RANK": str(rank), "RANK": str(rank)})
        for rank in range(contender.processes)
    ]


def _environ() -> dict[str, str]:
    # byte code may be kept, as for anything that is installed
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _started(command: Sequence[str], environ: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process, which is ended with all that it started."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            for one in reversed(_tree(process.pid)):
                with contextlib.suppress(psutil.Error):
                    one.kill()
            process.wait()


def _tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def _read(log: Path, failed: str) -> dict[str, Any]:
    """What a contender told; where it was ended, of the rounds that it had done."""
    lines = log.read_text(errors="replace").splitlines()
    told = {
        word: [json.loads(line.removeprefix(f"{word} ")) for line in lines if line.startswith(f"{word} ")]
        for word in ("BEGIN", "ROUND", "RESULT")
    }
    rounds = [float(seconds) for seconds in told["ROUND"]]
    found: dict[str, Any] = {"rounds": len(rounds), **({"failed": failed} if failed else {})}
    if told["BEGIN"]:
        found["startup_s"] = told["BEGIN"][0]
    if rounds:
        steady = rounds[len(rounds) // 5 :]
        found |= {"median_s": statistics.median(steady), "best_s": min(steady), "training_s": sum(rounds)}
    if told["RESULT"]:
        found |= told["RESULT"][0]
    elif not failed:
        found["failed"] = f"told no result, see {log}"
    return found


class PeakMemory(threading.Thread):
    """The largest proportional set size of some processes and all below them, looked at twice a second.

    Memory that processes share is counted once in all.

    Args:
        roots: process ids.

    Attributes:
        num_bytes: the largest so far.
    """

    def __init__(self, roots: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self._roots, self._over = roots, threading.Event()
        self.num_bytes = 0

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Look until it is over."""
        while not self._over.wait(0.5):
            everyone = [process.pid for root in self._roots for process in _tree(root)]
            self.num_bytes = max(self.num_bytes, sum(map(_proportional, everyone)))


def _proportional(pid: int) -> int:
    """A process's proportional set size in bytes; 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
