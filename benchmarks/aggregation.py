"""Aggregating a round: the journal's files to one update, against Flower and against this machine's memory.

    python benchmarks/aggregation.py [--clients 50] [--parameters 10000000] [--repeats 5] [--only NAME ...]
    FLOWER_ENV=venv python benchmarks/aggregation.py --only --blocks 128 512 1024 2048      # the means alone

So many updates lie in a journal as safetensors files. Every contestant runs in a process of its own, several times,
in turns, and its best and median rates are shown: bytes of updates over seconds. Flower runs in a virtual environment
that the script makes beside the files (FLOWER_ENV names another) and starts from what Flower has at that point of a
round: messages in memory; fedmp starts from the files. Beside them stand this machine's rates of reading memory (a sum)
and of copying it, which no aggregation can beat by much. Peak memory is that of the process above what it held before
(anonymous memory; mapped files belong to the page cache). `--blocks` adds the mean with blocks of other sizes than
fedmp's own, in KiB of float32. A contestant that takes longer than `--limit-s` is stopped, and left out of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from pathlib import Path

FLOWER = ("Flower's mean", "Flower's median")
OURS = (
    "WeightedMean",
    "CoordinateMedian",
    "TrimmedMean",
    "MultiKrum",
    "GeometricMedian",
    "Bulyan",
    "NormClipping",
)
MEMORY = ("memory read", "memory copy")
FAST = (*MEMORY, OURS[0], FLOWER[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--only", nargs="*", help="contestants beside the means, such as MultiKrum; nothing leaves all out"
    )
    parser.add_argument(
        "--blocks", type=int, nargs="*", default=[], help="KiB of float32 that are summed at a time"
    )
    parser.add_argument("--limit-s", type=float, default=90.0, help="for one run of one contestant")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measure(options.contestant, options.folder, options.clients)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_updates(Path(folder), options.clients, options.parameters)
        flower = os.environ.get("FLOWER_ENV") or make_flower(Path(folder) / "flower")
        show(contest(options, Path(folder), flower), options)


def write_updates(folder: Path, num_clients: int, num_parameters: int) -> None:
    import torch
    from safetensors.torch import save_file

    from fedmp.records import DeviceReport

    (folder / "round-00001").mkdir()
    report = DeviceReport(num_examples=1).model_dump_json()
    for client in range(num_clients):
        generator = torch.Generator().manual_seed(client)
        update = {"weight": torch.randn(num_parameters, generator=generator)}
        path = folder / "round-00001" / f"c{client}.0.safetensors"
        save_file(update, path, metadata={"report": report.replace(":1,", f":{client + 1},", 1)})


def make_flower(folder: Path) -> str:
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "pip", "install", "--quiet", "flwr"]
    subprocess.run(install, check=True, stderr=subprocess.DEVNULL)
    return str(folder)


def contest(options: argparse.Namespace, folder: Path, flower: str) -> dict[str, dict[str, float]]:
    """Everyone in turn, so that a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    fast = (*FAST, *(f"{OURS[0]}, {size} KiB" for size in options.blocks))
    others = [name for name in (*OURS, *FLOWER) if name not in fast]
    if options.only is not None:
        others = [name for name in others if name in options.only]
    for turn in range(options.repeats):
        for name in (*fast, *(others if turn == 0 else ())):  # of the slow ones, one run is long enough
            python = f"{flower}/bin/python" if name in FLOWER else sys.executable
            command = [python, __file__, "--contestant", name, "--folder", str(folder)]
            command += ["--clients", str(options.clients)]
            try:
                run = subprocess.run(
                    command, check=True, capture_output=True, text=True, timeout=options.limit_s
                )
            except subprocess.TimeoutExpired:
                print(f"{name}: stopped after {options.limit_s:g} s", flush=True)
                continue
            found = json.loads(run.stdout.splitlines()[-1])
            seconds.setdefault(name, []).append(found["seconds"])
            print(f"{name}: {found['seconds']:.3f} s", flush=True)
            peaks[name] = max(peaks.get(name, 0.0), found["peak_bytes"])
    size = options.clients * options.parameters * 4
    return {
        name: {
            "best_gb_per_s": size / min(times) / 1e9,
            "median_gb_per_s": size / statistics.median(times) / 1e9,
            "peak_stages": peaks[name] / (options.parameters * 4),
        }
        for name, times in seconds.items()
    }


def measure(name: str, folder: Path, num_clients: int) -> dict[str, float]:
    run = prepare(name, folder, num_clients)
    if name in FAST or "KiB" in name:
        run()  # the pages of the files, and whatever is made at first use
    with Peak() as peak:  # the files' pages are in the page cache, mapped or not
        started_s = time.perf_counter()
        run()
        seconds = time.perf_counter() - started_s
    return {"seconds": seconds, "peak_bytes": peak.bytes}


def prepare(name: str, folder: Path, num_clients: int) -> Callable[[], object]:
    if name in FLOWER:
        return prepare_flower(name, folder, num_clients)
    import torch

    import fedmp.aggregate
    from fedmp.aggregate import blocks
    from fedmp.coordinator import Journal

    name, _, size = name.partition(", ")
    if size:
        blocks._SUM_BLOCK = int(size.removesuffix(" KiB")) * 256

    journal = Journal(folder, {})
    journal.open(1)
    if name in MEMORY:
        updates = [journal.update_of(f"c{client}", 1) for client in range(num_clients)]
        tensors = [update["weight"] for update in updates if update is not None]
        if name == "memory read":
            return lambda: [tensor.sum() for tensor in tensors]
        target = torch.empty_like(tensors[0])
        return lambda: [target.copy_(tensor) for tensor in tensors]

    def aggregate() -> object:
        updates = [journal.update_of(f"c{client}", 1) for client in range(num_clients)]
        weights = [float(update.num_examples) for update in updates if update is not None]
        return getattr(fedmp.aggregate, name)().combine(updates, weights)

    return aggregate


def prepare_flower(name: str, folder: Path, num_clients: int) -> Callable[[], object]:
    import numpy as np
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    def read(client: int) -> RecordDict:
        raw = (folder / "round-00001" / f"c{client}.0.safetensors").read_bytes()
        values = np.frombuffer(raw, np.float32, offset=8 + int.from_bytes(raw[:8], "little"))
        arrays = ArrayRecord({"weight": Array(values)})
        return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": client + 1})})

    records = [read(client) for client in range(num_clients)]
    if name == "Flower's mean":
        return lambda: aggregate_arrayrecords(records, "num-examples")

    def median() -> (
        object
    ):  # as flwr.serverapp.strategy.FedMedian.aggregate_train does, once replies are checked
        layers = [record.array_records["arrays"].pop("weight").numpy() for record in records]
        return Array(np.asarray(np.median(np.stack(layers), axis=0)))

    return median


class Peak:
    """The largest anonymous memory of this process while it is open, above what it was before."""

    bytes = 0

    def __enter__(self) -> Peak:
        self._before = anonymous_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes() - self._before)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def show(rates: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    print(
        f"{options.clients} updates of {options.parameters:,} float32, load {os.getloadavg()[0]:.1f} at the end"
    )
    print(f"{'':24}{'best GB/s':>12}{'median GB/s':>12}{'peak, in stages':>18}")
    for name, row in rates.items():
        print(
            f"{name:24}{row['best_gb_per_s']:12.2f}{row['median_gb_per_s']:12.2f}{row['peak_stages']:18.2f}"
        )
    for ours, theirs in (("WeightedMean", FLOWER[0]), ("CoordinateMedian", FLOWER[1])):
        if ours not in rates or theirs not in rates:
            continue
        for kind in ("best", "median"):
            ratio = rates[ours][f"{kind}_gb_per_s"] / rates[theirs][f"{kind}_gb_per_s"]
            print(f"{ours} over {theirs}, {kind}: {ratio:.1f} x")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    found = {"load": os.getloadavg(), "rates": rates}
    (results / "aggregation.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
