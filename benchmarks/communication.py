"""Bytes to reach an accuracy: plain averaging, each transform, chains of them, DiLoCo, synchronous data parallelism.

    python benchmarks/communication.py [--data fashion,shakespeare] [--only NAME ...] [--folder DIR]

Simulated clients send the same bodies as real ones; bytes are those of all clients' bodies. Every method has the same
model, data, split, batches, and number of passes; learning rates fall to zero over the run. The target is what plain
federated averaging ends with, less half a point. A method's results go to `communication.json` in the folder as soon
as it has run, and the table and the picture `communication.png` are made of all that is there.

Synchronous data parallelism sends a gradient a step and takes the mean back. It is computed as one client with the
batches of all, which is the same arithmetic, and charged with one body a step and client each way.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from fedmp import Job, Topology
from fedmp.client import stage_body, update_body
from fedmp.data import ByUser, DataSource, Dirichlet, FashionMNIST, Shakespeare, Split
from fedmp.learning_rate import Cosine
from fedmp.models import GPT, MLP
from fedmp.records import DeviceReport
from fedmp.strategy import DiLoCo, FedAvg
from fedmp.updates import BFloat16, Int4, Int8, LowRank, RandomK, Sign, TopK, Zstd

mpl.use("Agg")
from matplotlib import pyplot as plt

_SLACK = 0.005  # half a point


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    Attributes:
        title: for people.
        model, source, split: the problem.
        num_clients, fraction: of each round's cohort.
        batch_size, rounds, local_epochs: of federated methods.
        rate, inner_rate: of SGD with momentum 0.9, and of DiLoCo's AdamW.
    """

    title: str
    model: Callable[[], torch.nn.Module]
    source: DataSource
    split: Split
    num_clients: int
    fraction: float
    batch_size: int
    rounds: int
    local_epochs: float
    rate: float
    inner_rate: float


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: in the table.
        transforms, downlink: of the job.
        is_diloco, is_synchronous: what it is besides.
    """

    name: str
    transforms: tuple[Any, ...] = ()
    downlink: tuple[Any, ...] = ()
    is_diloco: bool = False
    is_synchronous: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


class _DataParallel(FedAvg):
    """One client whose optimizer lives on: rounds are only where the model is evaluated."""

    @property
    def keeps_optimizer(self) -> bool:
        return True


SETTINGS = {
    "fashion": Setting(
        title="Fashion-MNIST, 10 clients, Dirichlet 0.5, MLP",
        model=partial(MLP, 784, (200, 100)),
        source=FashionMNIST(),
        split=Dirichlet(alpha=0.5),
        num_clients=10,
        fraction=1.0,
        batch_size=64,
        rounds=20,
        local_epochs=1.0,
        rate=0.03,
        inner_rate=0.001,
    ),
    "shakespeare": Setting(
        title="Shakespeare by role, 5 of 20 clients, transformer",
        model=partial(GPT, 97, 40, width=64, num_layers=1, num_heads=4),
        source=Shakespeare(seq_len=40, stride=640),
        split=ByUser(),
        num_clients=20,
        fraction=0.25,
        batch_size=16,
        rounds=24,
        local_epochs=1.0,
        rate=0.1,
        inner_rate=0.003,
    ),
}

_BEST = (LowRank(rank=16), Int4(block=64), Zstd())

METHODS = (
    Method("plain"),
    Method("bf16", (BFloat16(),)),
    Method("int8", (Int8(),)),
    Method("int4", (Int4(),)),
    Method("sign", (Sign(),)),
    Method("topk 5 %", (TopK(fraction=0.05),)),
    Method("topk 5 %, int4, zstd", (TopK(fraction=0.05), Int4(block=64), Zstd())),
    Method("randomk 5 %", (RandomK(fraction=0.05),)),
    Method("lowrank 8", (LowRank(rank=8),)),
    Method("lowrank 8, int4, zstd", (LowRank(rank=8), Int4(block=64), Zstd())),
    Method("lowrank 16, int4, zstd", _BEST),
    Method("the same; int8, zstd down", _BEST, (Int8(), Zstd())),
    Method("DiLoCo", is_diloco=True),
    Method("data parallel", is_synchronous=True),
)


def main() -> None:
    """Run what is asked for, then show all that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="fashion,shakespeare")
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--folder", type=Path, default=Path("runs/communication"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "communication.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for data in options.data.split(","):
        for method in METHODS:
            if options.only is not None and method.name not in options.only:
                continue
            started_s = time.monotonic()
            rows = _run(SETTINGS[data], method)
            seconds = time.monotonic() - started_s
            results.setdefault(data, {})[method.name] = {"rows": rows, "wall_s": seconds}
            path.write_text(json.dumps(results, indent=1))
            print(f"{data}: {method.name}: {100 * rows[-1]['accuracy']:.2f} % in {seconds:.0f} s", flush=True)
    for data, by_method in results.items():
        _show(SETTINGS[data], by_method)
    _draw(results, options.folder / "communication.png")


def _run(setting: Setting, method: Method) -> list[dict[str, float]]:
    """Accuracy and bytes so far after each round."""
    settings: dict[str, Any] = {
        "model": setting.model,
        "data": setting.source,
        "batch_size": setting.batch_size,
        "num_microbatches": 1,
        "partitioner": "uniform",
        "rounds": setting.rounds,
        "learning_rate": Cosine(),
        "transforms": method.transforms,
        "downlink": method.downlink,
        "optimizer": partial(torch.optim.SGD, lr=setting.rate, momentum=0.9),
        "topology": _topology(setting.num_clients),
        "split": setting.split,
    }
    num_bytes: Callable[[Any], tuple[float, float]] = lambda record: (record.bytes_up, record.bytes_down)  # noqa: E731
    strategy = FedAvg(local_epochs=setting.local_epochs, fraction=setting.fraction)
    samples = len(setting.source.load().train)
    steps = math.ceil(setting.local_epochs * samples / setting.num_clients / setting.batch_size)
    if method.is_diloco:
        # a quarter of the rounds, each four times as long
        settings |= {
            "strategy": DiLoCo(local_steps=4 * steps, fraction=setting.fraction),
            "rounds": setting.rounds // 4,
            "optimizer": partial(torch.optim.AdamW, lr=setting.inner_rate, weight_decay=0.0),
        }
    elif method.is_synchronous:
        cohort = round(setting.fraction * setting.num_clients)
        settings |= {
            "strategy": _DataParallel(local_steps=steps),
            "batch_size": cohort * setting.batch_size,
            "topology": _topology(1),
        }
        up, down = _gradient_bytes(setting.model())
        num_bytes = lambda _: (steps * cohort * up, steps * cohort * down)  # noqa: E731
    else:
        settings["strategy"] = strategy
    with tempfile.TemporaryDirectory() as folder:
        result = Job(**settings).run("simulate", run_dir=folder, observe=lambda _: None)
    rows, up, down = [], 0.0, 0.0
    for record in result.history:
        more = num_bytes(record)
        up, down = up + more[0], down + more[1]
        rows.append({"accuracy": record.test_accuracy, "bytes_up": up, "bytes_down": down})
    return rows


def _topology(num_clients: int) -> Topology:
    return Topology(clients=[{"name": f"c{index}", "devices": 1} for index in range(num_clients)])


def _gradient_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bodies of a gradient on its way up, and of the mean on its way down."""
    gradient = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return len(update_body(gradient, DeviceReport(num_examples=1))[0]), len(stage_body(gradient)[0])


def _show(setting: Setting, by_method: dict[str, Any]) -> None:
    """One line a method: what it ended with, and bytes to the target against those of plain averaging."""
    if "plain" not in by_method:
        return
    plain = by_method["plain"]["rows"]
    target = plain[-1]["accuracy"] - _SLACK
    reference = _reached(plain, target)
    assert reference is not None
    print(f"\n{setting.title}; target {100 * target:.2f} %")
    print(
        f"{'method':<30}{'final %':>9}{'rounds':>8}{'MB up':>10}{'MB down':>10}"
        f"{'fewer up':>10}{'than data parallel':>20}"
    )
    synchronous = by_method.get("data parallel", {"rows": []})["rows"]
    gradients = _reached(synchronous, target)
    for name, entry in by_method.items():
        rows = entry["rows"]
        reached = _reached(rows, target)
        if reached is None:
            print(f"{name:<30}{100 * rows[-1]['accuracy']:>9.2f}{'never':>8}")
            continue
        row = rows[reached]
        fewer = plain[reference]["bytes_up"] / row["bytes_up"]
        than = f"{synchronous[gradients]['bytes_up'] / row['bytes_up']:.0f}" if gradients is not None else ""
        print(
            f"{name:<30}{100 * rows[-1]['accuracy']:>9.2f}{reached + 1:>8}{row['bytes_up'] / 1e6:>10.2f}"
            f"{row['bytes_down'] / 1e6:>10.2f}{fewer:>10.1f}{than:>20}"
        )


def _reached(rows: list[dict[str, float]], target: float) -> int | None:
    return next((index for index, row in enumerate(rows) if row["accuracy"] >= target), None)


def _draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy against uploaded bytes, a panel for each data set."""
    figure, panels = plt.subplots(1, len(results), figsize=(6.5 * len(results), 5), squeeze=False)
    colours = plt.get_cmap("tab20")
    for panel, (data, by_method) in zip(panels[0], results.items(), strict=True):
        best = max(row["accuracy"] for entry in by_method.values() for row in entry["rows"])
        for index, method in enumerate(METHODS):
            if method.name not in by_method:
                continue
            rows = by_method[method.name]["rows"]
            style = "--" if method.is_synchronous else "-"
            panel.plot(
                [row["bytes_up"] / 1e6 for row in rows],
                [100 * row["accuracy"] for row in rows],
                style,
                color=colours(index),
                label=method.name,
            )
        if "plain" in by_method:
            target = 100 * (by_method["plain"]["rows"][-1]["accuracy"] - _SLACK)
            panel.axhline(target, color="0.6", linewidth=0.8)
            panel.annotate("target", (1, target), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        panel.set_xscale("log")
        panel.set_ylim(100 * best - 25, 100 * best + 1)
        panel.set_xlabel("MB uploaded by all clients")
        panel.set_ylabel("test accuracy, %")
        panel.set_title(SETTINGS[data].title, fontsize=10)
        panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
