"""Bytes to reach an accuracy: plain averaging, each transform, chains of them, DiLoCo, synchronous data parallelism.

    python benchmarks/communication.py [--data fashion,shakespeare] [--only NAME ...] [--seed N] [--again]

Simulated clients send the same bodies as real ones; bytes are those of all clients' bodies. Every method has the same
model, data, batches and, unless its name says otherwise, number of passes; learning rates fall to zero over the run.
The target is what plain federated averaging ends with, less half a point. A method's results go to
`results/communication-seed0.json` as soon as it has run, a method that has run is not run again, and the table and
the picture beside the file are made of all that is there.

Synchronous data parallelism sends a gradient a step and takes the mean back: rounds of one step without momentum at
the clients, and the momentum at the server. It is run like the others, a body a step and client each way. Its data
are dealt at random, as those of a cluster are, its rate is the best of a search, it is evaluated after each step, and
ends at the target.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from fedmp import Job, Topology
from fedmp.data import IID, ByUser, DataSource, Dirichlet, FashionMNIST, Shakespeare, Split
from fedmp.learning_rate import Cosine
from fedmp.models import GPT, MLP
from fedmp.records import RoundFinished
from fedmp.strategy import DiLoCo, FedAdam, FedAvg, FedAvgM
from fedmp.updates import EF21, BFloat16, Int4, Int8, LowRank, RandomK, Sign, TopK, Zstd

mpl.use("Agg")
from matplotlib import pyplot as plt

_SLACK = 0.005  # half a point


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    Attributes:
        title: for people.
        model, source, split: the problem.
        num_clients: all of which take part in every round.
        batch_size: of every client.
        rounds: of federated methods, of one pass each.
        optimizer, inner: the clients', and DiLoCo's.
        synchronous, gradient_step: server and client of synchronous data parallelism.
        synchronous_epochs: passes it makes at most; it ends at the target.
    """

    title: str
    model: Callable[[], torch.nn.Module]
    source: DataSource
    split: Split
    num_clients: int
    batch_size: int
    rounds: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    inner: Callable[[Any], torch.optim.Optimizer]
    synchronous: FedAvg
    gradient_step: Callable[[Any], torch.optim.Optimizer]
    synchronous_epochs: float


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: in the table.
        transforms, downlink: of the job.
        diloco_epochs: passes between DiLoCo's synchronisations; 0 for another method.
        is_synchronous: a gradient a step.
        passes: over a client's data in a round.
        rounds: as a share of those of the others.
    """

    name: str
    transforms: tuple[Any, ...] = ()
    downlink: tuple[Any, ...] = ()
    diloco_epochs: int = 0
    is_synchronous: bool = False
    passes: int = 1
    rounds: float = 1.0


SETTINGS = {
    "fashion": Setting(
        title="Fashion-MNIST, 10 clients, Dirichlet 0.5, MLP",
        model=partial(MLP, 784, (200, 100)),
        source=FashionMNIST(),
        split=Dirichlet(alpha=0.5),
        num_clients=10,
        batch_size=64,
        rounds=20,
        optimizer=partial(torch.optim.SGD, lr=0.03, momentum=0.9),
        inner=partial(torch.optim.AdamW, lr=0.001, weight_decay=0.0),
        synchronous=FedAvgM(momentum=0.9, local_steps=1),
        gradient_step=partial(torch.optim.SGD, lr=0.1),
        synchronous_epochs=3,
    ),
    "shakespeare": Setting(
        title="Shakespeare by role, 10 clients, transformer",
        model=partial(GPT, 97, 40, width=64, num_layers=1, num_heads=4),
        source=Shakespeare(seq_len=40, stride=640),
        split=ByUser(),
        num_clients=10,
        batch_size=16,
        rounds=20,
        optimizer=partial(torch.optim.AdamW, lr=0.003, weight_decay=0.0),
        inner=partial(torch.optim.AdamW, lr=0.003, weight_decay=0.0),
        synchronous=FedAdam(server_rate=0.003, beta2=0.999, tau=1e-8, local_steps=1),
        gradient_step=partial(torch.optim.SGD, lr=1.0),
        synchronous_epochs=20,
    ),
}

_BEST = (LowRank(rank=16), Int4(block=64), Zstd())

METHODS = (
    Method("plain"),
    Method("data parallel", is_synchronous=True),
    Method("bf16", (BFloat16(),)),
    Method("int8", (Int8(),)),
    Method("int4", (Int4(),)),
    Method("sign", (Sign(),)),
    Method("topk 5 %", (TopK(fraction=0.05),)),
    Method("topk 5 %, int4, zstd", (TopK(fraction=0.05), Int4(block=64), Zstd())),
    Method("randomk 5 %", (RandomK(fraction=0.05),)),
    Method("lowrank 8", (LowRank(rank=8),)),
    Method("lowrank 8, int4, zstd", (LowRank(rank=8), Int4(block=64), Zstd())),
    Method("lowrank 4, int4, zstd", (LowRank(rank=4), Int4(block=64), Zstd())),
    Method("lowrank 16, int4, zstd", _BEST),
    Method("plain; 10 rounds of 4 passes", passes=4, rounds=0.5),
    Method("lowrank 16, int4, zstd; 10 rounds of 4 passes", _BEST, passes=4, rounds=0.5),
    Method("lowrank 16, int4, zstd; int8, zstd down", _BEST, (Int8(), Zstd())),
    Method("ef21, topk 5 %, int4, zstd", (EF21(), TopK(fraction=0.05), Int4(block=64), Zstd())),
    Method("ef21, lowrank 8, int4, zstd", (EF21(), LowRank(rank=8), Int4(block=64), Zstd())),
    Method("DiLoCo, 2 passes a round", diloco_epochs=2),
    Method("DiLoCo, 4 passes a round", diloco_epochs=4),
    Method("DiLoCo, 2 passes; lowrank 16, int4, zstd", _BEST, diloco_epochs=2),
)


def main() -> None:
    """Run what is asked for and has not run, then show all that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="fashion,shakespeare")
    parser.add_argument("--only", nargs="*", help="names of methods; none to show what is there")
    parser.add_argument("--again", action="store_true", help="run methods that have run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = Path(__file__).parent / "results" / f"communication-seed{options.seed}.json"
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    for data in options.data.split(","):
        for method in METHODS:
            if options.only is not None and method.name not in options.only:
                continue
            if method.name in results.get(data, {}) and not options.again:
                continue
            started_s = time.monotonic()
            rows = run(SETTINGS[data], method, seed=options.seed, until=target_of(results.get(data, {})))
            seconds = time.monotonic() - started_s
            results.setdefault(data, {})[method.name] = {"rows": rows, "wall_s": seconds}
            path.write_text(json.dumps(results) + "\n")
            print(f"{data}: {method.name}: {100 * rows[-1]['accuracy']:.2f} % in {seconds:.0f} s", flush=True)
    for data, by_method in results.items():
        _show(SETTINGS[data], by_method)
    _draw(results, path.with_suffix(".png"))


def run(setting: Setting, method: Method, *, seed: int, until: float) -> list[dict[str, float]]:
    """Accuracy and bytes so far after each round."""
    job = Job(
        model=setting.model,
        data=setting.source,
        batch_size=setting.batch_size,
        num_microbatches=1,
        seed=seed,
        learning_rate=Cosine(),
        transforms=method.transforms,
        downlink=method.downlink,
        topology=Topology(
            clients=[{"name": f"c{index}", "devices": 1} for index in range(setting.num_clients)]
        ),
        **_training(setting, method),
    )
    rows: list[dict[str, float]] = []

    def watch(event: object) -> None:
        if not isinstance(event, RoundFinished):
            return
        record, before = event.record, rows[-1] if rows else {"bytes_up": 0, "bytes_down": 0}
        assert record.test_accuracy is not None
        rows.append(
            {
                "accuracy": record.test_accuracy,
                "bytes_up": before["bytes_up"] + record.bytes_up,
                "bytes_down": before["bytes_down"] + record.bytes_down,
            }
        )
        if method.is_synchronous and record.test_accuracy >= until:
            raise _Reached

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Reached):
        job.run("simulate", run_dir=folder, observe=watch)
    return rows


class _Reached(Exception):  # noqa: N818
    """The target is reached: the run may end."""


def _training(setting: Setting, method: Method) -> dict[str, Any]:
    """Strategy, split, rounds and client optimizer."""
    epoch_steps = math.ceil(len(setting.source.load().train) / setting.num_clients / setting.batch_size)
    if method.diloco_epochs:
        return {
            "split": setting.split,
            "strategy": DiLoCo(local_steps=method.diloco_epochs * epoch_steps),
            "rounds": setting.rounds // method.diloco_epochs,
            "optimizer": setting.inner,
        }
    if method.is_synchronous:
        return {
            "split": IID(),
            "strategy": setting.synchronous,
            "rounds": round(setting.synchronous_epochs * epoch_steps),
            "optimizer": setting.gradient_step,
        }
    return {
        "split": setting.split,
        "strategy": FedAvg(local_epochs=method.passes),
        "rounds": round(setting.rounds * method.rounds),
        "optimizer": setting.optimizer,
    }


def _show(setting: Setting, by_method: dict[str, Any]) -> None:
    """One line a method: what it ended with, and bytes to the target against those of plain averaging."""
    if "plain" not in by_method:
        return
    plain = by_method["plain"]["rows"]
    target = target_of(by_method)
    reference = reached(plain, target)
    assert reference is not None
    print(f"\n{setting.title}; target {100 * target:.2f} %")
    print(
        f"{'method':<48}{'final %':>9}{'rounds':>8}{'MB up':>10}{'MB down':>10}"
        f"{'fewer up':>10}{'than data parallel':>20}"
    )
    synchronous = by_method.get("data parallel", {"rows": []})["rows"]
    gradients = reached(synchronous, target)
    for name, entry in by_method.items():
        rows = entry["rows"]
        first = reached(rows, target)
        if first is None:
            print(f"{name:<48}{100 * rows[-1]['accuracy']:>9.2f}{'never':>8}")
            continue
        row = rows[first]
        fewer = plain[reference]["bytes_up"] / row["bytes_up"]
        than = f"{synchronous[gradients]['bytes_up'] / row['bytes_up']:.0f}" if gradients is not None else ""
        print(
            f"{name:<48}{100 * rows[-1]['accuracy']:>9.2f}{first + 1:>8}{row['bytes_up'] / 1e6:>10.2f}"
            f"{row['bytes_down'] / 1e6:>10.2f}{fewer:>10.1f}{than:>20}"
        )


def target_of(by_method: dict[str, Any]) -> float:
    """The accuracy that plain averaging ends with, less half a point; beyond reach if it has not run."""
    return float(by_method["plain"]["rows"][-1]["accuracy"]) - _SLACK if "plain" in by_method else 1.0


def reached(rows: list[dict[str, float]], target: float) -> int | None:
    """The first round that reaches the target."""
    return next((index for index, row in enumerate(rows) if row["accuracy"] >= target), None)


def _draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy against uploaded bytes, a panel for each data set."""
    figure, panels = plt.subplots(
        1, len(results), figsize=(5 * len(results) + 4, 5), squeeze=False, layout="constrained"
    )
    shown = [method for method in METHODS if any(method.name in by_method for by_method in results.values())]
    colours = plt.get_cmap("tab10")
    for panel, (data, by_method) in zip(panels[0], results.items(), strict=True):
        best = max(row["accuracy"] for entry in by_method.values() for row in entry["rows"])
        for index, method in enumerate(shown):
            if method.name not in by_method:
                continue
            rows = by_method[method.name]["rows"]
            style = "--" if method.is_synchronous else ("-", "-.", ":")[index // 10]
            panel.plot(
                [row["bytes_up"] / 1e6 for row in rows],
                [100 * row["accuracy"] for row in rows],
                style,
                color=colours(index % 10),
                label=method.name,
            )
        if "plain" in by_method:
            target = 100 * target_of(by_method)
            panel.axhline(target, color="0.6", linewidth=0.8)
            panel.annotate("target", (1, target), xycoords=("axes fraction", "data"), ha="right", va="top")
        panel.set_xscale("log")
        panel.set_ylim(100 * best - 25, 100 * best + 1)
        panel.set_xlabel("MB uploaded by all clients")
        panel.set_ylabel("test accuracy, %")
        panel.set_title(SETTINGS[data].title, fontsize=10)
        panel.grid(alpha=0.3)
    lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()}
    named = [lines[method.name] for method in shown]
    figure.legend(named, [method.name for method in shown], fontsize=9, loc="outside right upper")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
