"""How well the virtual clock predicts real time: a step, and a whole round.

    python benchmarks/clock.py [--rounds 4] [--only NAME]

Each topology is run by the local engine, with real processes and messages, devices and links held back to the
topology's speeds (`engine.emulate`), so that this machine's own speed does not matter as long as it is faster. The
step is the time from one optimizer step of the first client to its next; a round is what the coordinator waits, from
opening it to having its new model. Prints predicted and real seconds and their ratio, and writes them
as JSON. Fails if a step is off by more than 10 %, or a round by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedmp import Job, Topology
from fedmp.data import ArrayData
from fedmp.engine.local import LocalEngine
from fedmp.models import MLP
from fedmp.schedule import GPipe, OneFOneB, VShape

RESULTS = Path(__file__).parent / "results"
STEP_LIMIT, ROUND_LIMIT = 0.10, 0.15
LAN: dict[str, Any] = {"default": {"bandwidth_bytes_per_s": 12.5e6, "latency_s": 1e-3}}
SLOW: dict[str, Any] = {"default": {"bandwidth_bytes_per_s": 5e5, "latency_s": 5e-3}}
UPLINK = {"bandwidth_bytes_per_s": 2.5e6, "latency_s": 2e-2}
MODEM = {"bandwidth_bytes_per_s": 4e5, "latency_s": 1e-1}


class Logged(torch.optim.SGD):
    """Writes down when a device makes each of a round's steps."""

    def __init__(self, parameters: Any, *, log: Path, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self._log = log
        self._times: list[float] = []

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self._times.append(time.perf_counter())
        device = multiprocessing.current_process().name.removeprefix("fedmp ")
        if len(self._times) > 1:
            with self._log.open("a") as file:
                file.write(f"{device} {self._times[-1] - self._times[-2]}\n")


def devices(*speeds: float) -> list[dict[str, Any]]:
    """Devices of these speeds in MFLOP/s: slower than any machine that this runs on."""
    return [{"name": f"d{rank}", "flops_per_s": 1e6 * speed} for rank, speed in enumerate(speeds)]


def clients(*each: tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]) -> Topology:
    """Clients of devices, links and uplinks."""
    return Topology(
        clients=[
            {"name": f"c{number}", "devices": own, "links": links, "uplink": uplink}
            for number, (own, links, uplink) in enumerate(each)
        ]
    )


CASES: dict[str, tuple[Topology, Any]] = {
    "even": (clients((devices(500, 500), LAN, UPLINK)), OneFOneB()),
    "unequal devices": (clients((devices(200, 800, 400), LAN, UPLINK)), OneFOneB()),
    "slow links": (clients((devices(500, 500, 500), SLOW, UPLINK)), OneFOneB()),
    "gpipe, slow links": (clients((devices(300, 600), SLOW, UPLINK)), GPipe()),
    "v-shape": (clients((devices(500, 500), LAN, UPLINK)), VShape()),
    "two clients, a modem": (
        clients(
            (devices(500, 250), LAN, UPLINK),
            (
                devices(
                    400,
                ),
                LAN,
                MODEM,
            ),
        ),
        OneFOneB(),
    ),
}


def job(topology: Topology, schedule: Any, rounds: int, log: Path) -> Job:
    """Five steps a round of an MLP with 1.9 MB of weights, on data of no meaning."""
    num_samples = 320 * len(topology.clients)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 784, generator=generator)
    y = torch.randint(0, 10, (num_samples,), generator=generator)
    return Job(
        model=partial(MLP, 784, (256, 256, 256, 256, 256)),
        topology=topology,
        data=ArrayData(x, y, x[:10], y[:10]),
        partitioner="uniform",
        schedule=schedule,
        optimizer=partial(Logged, log=log, lr=0.01),
        batch_size=64,
        num_microbatches=8,
        rounds=rounds,
    )


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Run one case."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps"
        result = job(*CASES[name], rounds, log).run(
            LocalEngine(emulate=True), run_dir=Path(folder) / "run", observe=lambda _: None
        )
        rows = [line.split() for line in log.read_text().splitlines()]
    step_s = statistics.median(float(seconds) for device, seconds in rows if device.startswith("c0/"))
    predicted_step_s = next(iter(result.plans.values())).step_s
    later = result.history[1:]  # the first round waits for the processes to meet
    round_s = statistics.median(record.wall_s for record in later)
    predicted_round_s = later[0].simulated_s
    return {
        "case": name,
        "step_s": step_s,
        "predicted_step_s": predicted_step_s,
        "step_ratio": predicted_step_s / step_s,
        "round_s": round_s,
        "predicted_round_s": predicted_round_s,
        "round_ratio": predicted_round_s / round_s,
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", choices=list(CASES))
    options = parser.parse_args()
    rows = []
    print(f"{'':22} {'step':>8} {'predicted':>10} {'ratio':>6}   {'round':>8} {'predicted':>10} {'ratio':>6}")
    for name in [options.only] if options.only else CASES:
        row = measure(name, options.rounds)
        rows.append(row)
        print(
            f"{name:22} {row['step_s']:7.3f}s {row['predicted_step_s']:9.3f}s {row['step_ratio']:6.3f}   "
            f"{row['round_s']:7.3f}s {row['predicted_round_s']:9.3f}s {row['round_ratio']:6.3f}",
            flush=True,
        )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "clock.json"
    path.write_text(f"{json.dumps(rows, indent=2)}\n")
    print(f"written: {path}")
    steps = max(abs(1 - row["step_ratio"]) for row in rows)
    whole = max(abs(1 - row["round_ratio"]) for row in rows)
    print(
        f"worst: step {steps:.1%} (at most {STEP_LIMIT:.0%}), round {whole:.1%} (at most {ROUND_LIMIT:.0%})"
    )
    return int(steps > STEP_LIMIT or whole > ROUND_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
