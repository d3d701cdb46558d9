"""The federation plane on loopback: a coordinator's memory under many uploaders, and its upload throughput.

    python benchmarks/federation.py [--clients 200] [--stage-mib 16] [--upload-mib 256]

Memory: a coordinator in a process of its own takes one stage's update from each of so many clients, eight at a
time, and aggregates them; its peak is compared with the size of the stage. Throughput: a device's upload of one
stage, checked, hashed and flushed to disk before it is acknowledged, against the same bytes copied through a plain
socket into a file. Both sides run in turn, and the medians' ratio is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fedmp.aggregate import WeightedMean
from fedmp.client import HttpFederation
from fedmp.coordinator import (
    Board,
    Checkpoint,
    CheckpointStore,
    CoordinatorService,
    GlobalModel,
    Journal,
    Member,
)
from fedmp.graph import StateSpec
from fedmp.records import DeviceReport

UPLOADERS = 8
NUM_TENSORS = 8


def specs(num_bytes: int) -> dict[str, StateSpec]:
    shape = (num_bytes // 4 // NUM_TENSORS,)
    return {
        name: StateSpec(name, (name,), shape, torch.float32, "parameter", True, True)
        for name in (f"weight{index}" for index in range(NUM_TENSORS))
    }


def serve(folder: Path, num_clients: int, num_bytes: int, pipe: Connection) -> None:
    """The coordinator: one round of clients with one stage each."""
    torch.set_num_threads(1)
    named = specs(num_bytes)
    names = tuple(named)
    members = {
        f"c{i}": Member(f"c{i}", "d0", 0, (0,), names, names, "whole", num_bytes + (4 << 20))
        for i in range(num_clients)
    }
    clients = [member.client for member in members.values()]
    board, journal = Board(members), Journal(folder / "journal", named)
    before = memory_bytes()
    model = GlobalModel(named, {name: torch.zeros(spec.shape) for name, spec in named.items()})
    journal.open(1)
    board.open_round(1, clients)
    peak = Peak()
    with CoordinatorService(board, journal, model) as service, peak:
        pipe.send(service.url)
        while not board.wait_for_cohort(timeout_s=1):
            pass
        taken = peak.anonymous
        updates = [journal.update_of(client, 1) for client in clients]
        model.apply(WeightedMean().combine(updates, [1.0] * num_clients))  # type: ignore[arg-type]
        CheckpointStore(folder / "checkpoints").save(Checkpoint(1, "", model.state, {}, {}))
    pipe.send({"before": before, "taken": taken, "anonymous": peak.anonymous, "resident": peak.resident})


def memory_bytes(kind: str = "RssAnon") -> int:
    """This process's memory: `RssAnon` is its own, `VmRSS` counts mapped files of the page cache as well."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{kind}:")[1].split()[0]) * 1024


class Peak:
    """The largest memory of this process while it is open."""

    anonymous = resident = 0

    def __enter__(self) -> Peak:
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.005):
            self.anonymous = max(self.anonymous, memory_bytes())
            self.resident = max(self.resident, memory_bytes("VmRSS"))


def start(folder: Path, num_clients: int, num_bytes: int) -> tuple[Connection, str]:
    here, there = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(
        target=serve, args=(folder, num_clients, num_bytes, there), daemon=True
    ).start()
    return here, here.recv()


def measure_memory(num_clients: int, num_bytes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        pipe, url = start(Path(folder), num_clients, num_bytes)
        update = {name: torch.randn(spec.shape) for name, spec in specs(num_bytes).items()}

        def push(index: int) -> None:
            HttpFederation(url, f"c{index}").push(1, update, DeviceReport(num_examples=1))

        started_s = time.perf_counter()
        with ThreadPoolExecutor(UPLOADERS) as pool:
            list(pool.map(push, range(num_clients)))
        wall_s = time.perf_counter() - started_s
        told = pipe.recv()
    return {
        "clients": num_clients,
        "uploads_bytes_per_s": num_clients * num_bytes / wall_s,
        "journalling_stages": (told["taken"] - told["before"]) / num_bytes,
        "aggregating_stages": (told["anonymous"] - told["before"]) / num_bytes,
        "resident_bytes": told["resident"],
    }


def time_uploads(num_bytes: int, repeats: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        _, url = start(Path(folder), repeats + 1, num_bytes)
        update = {name: torch.randn(spec.shape) for name, spec in specs(num_bytes).items()}
        times = []
        for index in range(repeats):
            federation = HttpFederation(url, f"c{index}")
            federation.instruction()  # the connection is up, as a device's is
            started_s = time.perf_counter()
            federation.push(1, update, DeviceReport(num_examples=1))
            times.append(time.perf_counter() - started_s)
        HttpFederation(url, f"c{repeats}").push(1, update, DeviceReport(num_examples=1))
        return times


def copy_to_file(listener: socket.socket, path: Path, num_bytes: int) -> None:
    near, _ = listener.accept()
    with near, path.open("wb", buffering=0) as file:
        while num_bytes > 0:
            part = near.recv(1 << 18)
            file.write(part)
            num_bytes -= len(part)
        os.fsync(file.fileno())
        near.sendall(b"!")


def time_copies(num_bytes: int, repeats: int) -> list[float]:
    body = os.urandom(num_bytes)
    times = []
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(repeats):
            process = multiprocessing.get_context("fork").Process(
                target=copy_to_file, args=(listener, Path(folder) / "copy", num_bytes), daemon=True
            )
            process.start()
            with socket.create_connection(listener.getsockname()) as raw:
                started_s = time.perf_counter()
                raw.sendall(body)
                assert raw.recv(1) == b"!"
                times.append(time.perf_counter() - started_s)
            process.join()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 50, 200])
    parser.add_argument("--stage-mib", type=int, default=16)
    parser.add_argument("--upload-mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    memory = []
    for num_clients in given.clients:
        row = measure_memory(num_clients, given.stage_mib << 20)
        memory.append(row)
        taking, whole = row["journalling_stages"], row["aggregating_stages"]
        print(
            f"{num_clients:4} clients of {given.stage_mib} MiB: the coordinator grows by {taking:.2f} stages while "
            f"it takes them, by {whole:.2f} with aggregation and commit; "
            f"{row['uploads_bytes_per_s'] / 2**20:.0f} MiB/s in all",
            flush=True,
        )
    size = given.upload_mib << 20
    copies = time_copies(size, given.repeats)
    uploads = time_uploads(size, given.repeats)
    copy, upload = (size / statistics.median(times) / 2**20 for times in (copies, uploads))
    print(
        f"upload of {given.upload_mib} MiB: {upload:.0f} MiB/s, plain socket to a file: {copy:.0f} MiB/s, "
        f"ratio {upload / copy:.2f}"
    )
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "federation.json").write_text(
        json.dumps({"memory": memory, "upload_mib_per_s": upload, "copy_mib_per_s": copy}, indent=1)
    )


if __name__ == "__main__":
    main()
