"""Convergence on MNIST against published results, in the simulating engine.

    FEDMP_DATA_DIR=... python benchmarks/convergence_mnist.py [2nn-iid 2nn-shards-e1 2nn-shards-e5 lr-power-law]

- McMahan et al., 2017, table 2: the 2NN (784-200-200-10) on 100 clients, 10 a round, batch 10, one local epoch
  reaches 97 % after 87 rounds with IID data, after 664 with two shards a client (table 1: E = 5 helps IID data).
  The paper tunes the learning rate for each setting and takes the best accuracy so far; so do we, with the
  rate given below.
- Logistic regression on 1,000 clients with two labels each and power-law sizes (Li et al., 2020, FedProx;
  published for this setting by FedML: 81.9 %, 10 clients a round, batch 10, rate 0.03), at 200 rounds.

Prints a table and writes `results/convergence_mnist.json` with every round's accuracy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fedmp import Client, Job, Topology
from fedmp.data import IID, MNIST, ArrayData, PowerLaw, Shards, Split
from fedmp.models import MLP
from fedmp.records import RoundFinished
from fedmp.strategy import FedAvg


@dataclass(frozen=True)
class Setting:
    """A published result.

    Attributes:
        hidden: widths of the model's hidden layers; none for logistic regression.
        split, num_clients, local_epochs, lr: of the federation; 10 clients a round, batch 10.
        rounds: to run at most.
        target: accuracy that ends the run; None runs all rounds.
        published: what the paper says.
        pixels: as the paper's models see them: "unit" (0..1), or "standardised" (each with its own mean and
            deviation over the training set, as FedProx's code has them).
    """

    hidden: tuple[int, ...]
    split: Split
    num_clients: int
    local_epochs: float
    lr: float
    rounds: int
    target: float | None
    published: str
    pixels: str = "unit"


SETTINGS = {
    "2nn-iid": Setting((200, 200), IID(), 100, 1, 0.1, 130, 0.97, "97 % after 87 rounds"),
    "2nn-shards-e1": Setting((200, 200), Shards(), 100, 1, 0.05, 700, 0.97, "97 % after 664 rounds"),
    "2nn-shards-e5": Setting((200, 200), Shards(), 100, 5, 0.05, 400, 0.97, "not given for batch 10"),
    "lr-power-law": Setting((), PowerLaw(), 1000, 1, 0.03, 200, None, "81.9 % at 200 rounds", "standardised"),
}


class Reached(Exception):  # noqa: N818
    """The target is reached: the run may end."""


def images(pixels: str) -> ArrayData:
    """MNIST with its pixels as a paper has them."""
    data = MNIST().load()
    (x_train, x_test) = (part.inputs.float().flatten(1) / 255 for part in (data.train, data.test))  # type: ignore[union-attr]
    if pixels == "standardised":
        mean, std = x_train.mean(dim=0), x_train.std(dim=0)
        x_train, x_test = ((x - mean) / (std + 1e-3) for x in (x_train, x_test))
    return ArrayData(x_train, data.train.targets, x_test, data.test.targets)


def run(setting: Setting, *, seed: int = 0, rounds: int | None = None) -> list[float]:
    """The accuracy after each round, until the target is reached."""
    job = Job(
        model=partial(MLP, 784, setting.hidden),
        topology=Topology(
            clients=[Client(name=f"c{index:04}", devices=1) for index in range(setting.num_clients)]
        ),
        data=images(setting.pixels),
        split=setting.split,
        strategy=FedAvg(fraction=10 / setting.num_clients, local_epochs=setting.local_epochs),
        optimizer=partial(torch.optim.SGD, lr=setting.lr),
        rounds=rounds or setting.rounds,
        batch_size=10,
        num_microbatches=1,
        seed=seed,
    )
    curve: list[float] = []

    def watch(event: object) -> None:
        if isinstance(event, RoundFinished):
            curve.append(event.record.test_accuracy or 0.0)
            if setting.target is not None and curve[-1] >= setting.target:
                raise Reached

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Reached):
        job.run("simulate", run_dir=Path(folder) / "run", observe=watch)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="at most so many, to try it out")
    given = parser.parse_args()
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    path = results / "convergence_mnist.json"
    curves = json.loads(path.read_text()) if path.exists() else {}
    for name in given.settings:
        setting = SETTINGS[name]
        started_s = time.monotonic()
        curves[name] = run(setting, seed=given.seed, rounds=given.rounds)
        took_s = time.monotonic() - started_s
        best, last = max(curves[name]), len(curves[name])
        if setting.target is not None and best >= setting.target:
            ours = f"{setting.target:.0%} after {last} rounds"
        else:
            ours = f"{curves[name][-1]:.2%} (best {best:.2%}) at {last} rounds"
        print(f"{name}: {ours}; published: {setting.published}; took {took_s:.0f} s", flush=True)
        path.write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    main()
