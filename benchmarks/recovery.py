"""How fast a client heals, and what that leaves of its throughput.

    python benchmarks/recovery.py [--kills 50]           # detect, train again, first step again
    python benchmarks/recovery.py --retained [--seconds 60] [--repeats 2]

Devices are killed by SIGKILL from outside, at a random moment of their training, on loopback; the next one when the
last one is back and a spare process has had the time to stand by. Times count from the kill: until the run says so,
until the new process has pulled its stage and met its peers, and until it has finished its first optimizer step, for
which the whole pipeline must be up. `--retained` compares the samples a second in committed rounds with one kill every
30 s to those with none, in turn, each after its first round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedmp import Job, Topology
from fedmp.data import ArrayData
from fedmp.engine.local import LocalEngine
from fedmp.models import MLP
from fedmp.records import Event, Note, RoundFinished
from fedmp.strategy import FedAvg

RESULTS = Path(__file__).parent / "results"
ENGINE = LocalEngine(restarts=10_000, attempts=10_000)
KILL_EVERY_S = 30.0
PAUSE_S = (1.5, 2.5)


class Logged(torch.optim.SGD):
    """Writes down when a device begins to train and when it has made its first step."""

    def __init__(self, parameters: Any, *, log: Path, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self._log = log
        self._steps = 0
        self._write("begin")

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        if self._steps == 0:
            self._write("step")
        self._steps += 1

    def _write(self, what: str) -> None:
        name = multiprocessing.current_process().name.removeprefix("fedmp ")
        line = f"{time.monotonic()} {os.getpid()} {name} {what}\n"
        with self._log.open("a") as file:
            file.write(line)


def job(log: Path, *, devices: tuple[int, ...], local_steps: int, rounds: int) -> Job:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 64, generator=generator), torch.randint(0, 10, (256,), generator=generator)
    return Job(
        model=partial(MLP, 64, (128,) * 7),
        topology=Topology(clients=[{"name": f"c{i}", "devices": n} for i, n in enumerate(devices)]),
        data=ArrayData(x, y, x[:32], y[:32]),
        partitioner="uniform",
        optimizer=partial(Logged, log=log, lr=0.01),
        strategy=FedAvg(local_steps=local_steps),
        rounds=rounds,
        batch_size=32,
        num_microbatches=4,
    )


def kill_one(name: str) -> int:
    """Kill a device's process; returns its id."""
    process = next(p for p in multiprocessing.active_children() if p.name == f"fedmp {name}")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    return process.pid


def read(log: Path) -> list[tuple[float, int, str, str]]:
    rows = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    # the planner makes an optimizer, too, in the main process
    return [(float(row[0]), int(row[1]), row[2], row[3]) for row in rows if "/" in row[2]]


def measure_kills(num_kills: int) -> dict[str, Any]:
    """One endless round of two clients with four devices each."""
    folder = Path(tempfile.mkdtemp())
    log, notes, kills = folder / "log", list[float](), list[tuple[float, str, int]]()
    names = [f"c{client}/d{device}" for client in range(2) for device in range(4)]
    is_over = threading.Event()

    def assail() -> None:
        chance = random.Random(0)
        up = len(names)
        while len(kills) < num_kills:
            steps = {pid for _, pid, _, what in read(log) if what == "step"}
            if len(steps) < up:  # the last victim's successor is not back yet
                time.sleep(0.005)
                continue
            time.sleep(chance.uniform(*PAUSE_S))
            name = chance.choice(names)
            kills.append((time.monotonic(), name, kill_one(name)))
            up += 1
        while len({pid for _, pid, _, what in read(log) if what == "step"}) < up:
            time.sleep(0.005)
        is_over.set()

    def observe(event: Event) -> None:
        if isinstance(event, Note) and "anew" in event.message:
            notes.append(time.monotonic())
        if is_over.is_set():
            raise KeyboardInterrupt

    threading.Thread(target=assail, daemon=True).start()
    try:
        endless = job(log, devices=(4, 4), local_steps=10_000_000, rounds=1)
        endless.run(ENGINE, run_dir=folder / "run", observe=observe)
    except KeyboardInterrupt:
        pass
    rows = read(log)
    spans: dict[str, list[float]] = {"detect_s": [], "train_again_s": [], "first_step_again_s": []}
    for number, (killed_s, name, pid) in enumerate(kills):
        until_s = kills[number + 1][0] if number + 1 < len(kills) else float("inf")
        later = [row for row in rows if killed_s < row[0] < until_s and row[2] == name and row[1] != pid]
        spans["detect_s"].append(min(at_s for at_s in notes if at_s > killed_s) - killed_s)
        for what, key in (("begin", "train_again_s"), ("step", "first_step_again_s")):
            spans[key].append(min(at_s for at_s, _, _, kind in later if kind == what) - killed_s)
    return {
        "kills": len(kills),
        **{key: {"median": statistics.median(v), "worst": max(v)} for key, v in spans.items()},
    }


def samples_per_s(seconds: float, kill_every_s: float | None) -> float:
    """Of committed rounds, eight devices in one client."""
    folder = Path(tempfile.mkdtemp())
    finished: list[tuple[float, int]] = []
    is_over = threading.Event()

    def assail() -> None:
        chance = random.Random(1)
        assert kill_every_s is not None
        if is_over.wait(kill_every_s / 2):
            return
        while True:
            kill_one(f"c0/d{chance.randrange(8)}")
            if is_over.wait(kill_every_s):
                return

    def observe(event: Event) -> None:
        if not isinstance(event, RoundFinished):
            return
        finished.append((time.monotonic(), event.record.num_examples))
        if len(finished) == 1 and kill_every_s is not None:
            threading.Thread(target=assail, daemon=True).start()
        if time.monotonic() - finished[0][0] > seconds:
            is_over.set()
            raise KeyboardInterrupt

    try:
        long = job(folder / "log", devices=(8,), local_steps=60, rounds=10_000)
        long.run(ENGINE, run_dir=folder / "run", observe=observe)
    except KeyboardInterrupt:
        pass
    return sum(samples for _, samples in finished[1:]) / (finished[-1][0] - finished[0][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--retained", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    if arguments.retained:
        sides: dict[str, list[float]] = {"undisturbed_samples_per_s": [], "disturbed_samples_per_s": []}
        for _ in range(arguments.repeats):
            sides["undisturbed_samples_per_s"].append(samples_per_s(arguments.seconds / 2, None))
            sides["disturbed_samples_per_s"].append(samples_per_s(arguments.seconds, KILL_EVERY_S))
        undisturbed, disturbed = map(statistics.mean, sides.values())
        result: dict[str, Any] = {**sides, "ratio": disturbed / undisturbed}
        name = "recovery_retained.json"
    else:
        result, name = measure_kills(arguments.kills), "recovery.json"
    print(json.dumps(result, indent=2))
    (RESULTS / name).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
