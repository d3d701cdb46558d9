"""The workloads: what the clients hold, which model they train and how. Each is written to a file that all read."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["WORKLOADS", "Workload", "write"]


@dataclass(frozen=True)
class Workload:
    """One of them.

    Attributes:
        title: what it is.
        clients, cohort: how many there are, and how many train in a round.
        widths: of the fully connected layers of the model; empty for the CNN.
        lr, batch_size, rounds: of the training; one local epoch.
        target: accuracy at which a run is over; it is tested after every round then.
        tested: last rounds whose mean accuracy is told: more than one where it goes up and down.
        every: of these rounds each so many-th is tested.
        targets: times as fast as a rival that fedmp is to be, by rival.
    """

    title: str
    clients: int
    cohort: int
    widths: tuple[int, ...]
    lr: float
    rounds: int
    batch_size: int = 10
    target: float | None = None
    tested: int = 1
    every: int = 1
    targets: dict[str, float] = field(default_factory=dict)


WORKLOADS = {
    "W1": Workload(
        "CNN, digits 8x8, 50 clients of 30", 50, 50, (), 0.05, 20, targets={"pfl": 4, "flower": 12}
    ),
    "W2": Workload(
        "MLP 64-128-10, digits, 100 of 1,000 clients of 20",
        1000,
        100,
        (64, 128, 10),
        0.1,
        50,
        targets={"pfl": 20, "flower": 250},
    ),
    "W3": Workload(
        "logistic regression, MNIST, 10 of 1,000 clients of power-law sizes, 2 labels each",
        1000,
        10,
        (784, 10),
        0.03,
        100,
        tested=20,
        every=5,
    ),
    "W4": Workload(
        "MNIST 2NN, 10 of 100 clients, IID, to 97 %", 100, 10, (784, 200, 200, 10), 0.1, 120, target=0.97
    ),
}


def write(name: str, work: Workload, folder: Path, digits_python: str) -> Path:
    """Draw a workload's split and write all of it to a file.

    Args:
        name: of the workload; W1 and W2 take digits, others MNIST from FEDMP_DATA_DIR.
        work: the workload, whose numbers may have been changed.
        folder: for the file.
        digits_python: an interpreter that has scikit-learn, which brings the digits.
    """
    generator = np.random.default_rng(0)
    if name in ("W1", "W2"):
        x, y = _digits(folder, digits_python)
        order = generator.permutation(len(x))
        test, train = order[:297], order[297:]
        x, y, x_test, y_test = x[train], y[train], x[test], y[test]
    else:
        x, y, x_test, y_test = _mnist()
    parts = {"W2": _dirichlet, "W3": _power_law}.get(name, _equal)(y, work.clients, generator)
    path = folder / f"{name}.npz"
    np.savez(
        path,
        x=x,
        y=y,
        x_test=x_test,
        y_test=y_test,
        rows=np.concatenate(parts).astype(np.int64),
        ends=np.cumsum([len(part) for part in parts]),
        settings=json.dumps(
            {"name": name, **{key: value for key, value in vars(work).items() if key != "targets"}}
        ),
    )
    return path


def _digits(folder: Path, python: str) -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits of scikit-learn."""
    path = folder / "digits.npz"
    if not path.exists():
        code = (
            "import sys, numpy as np; from sklearn.datasets import load_digits; d = load_digits();"
            "np.savez(sys.argv[1], x=d.images.astype('float32')[:, None] / 16, y=d.target)"
        )
        subprocess.run([python, "-c", code, str(path)], check=True)
    held = np.load(path)
    return held["x"], held["y"].astype(np.int64)


def _mnist() -> tuple[np.ndarray, ...]:
    folder = os.environ.get("FEDMP_DATA_DIR")
    path = Path(folder or "") / "mnist.npz"
    if folder is None or not path.exists():
        raise SystemExit(
            f"W3 and W4 need {path.name} in the folder FEDMP_DATA_DIR (now {folder}); or --only W1,W2"
        )
    held = np.load(path)
    images = [held[key].astype(np.float32)[:, None] / 255 for key in ("x_train", "x_test")]
    return images[0], held["y_train"].astype(np.int64), images[1], held["y_test"].astype(np.int64)


def _equal(y: np.ndarray, clients: int, generator: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(generator.permutation(len(y)), clients)


def _dirichlet(y: np.ndarray, clients: int, generator: np.random.Generator) -> list[np.ndarray]:
    """20 images a client, classes by Dir(0.5); the images are few, so clients share them."""
    by_class = [np.flatnonzero(y == label) for label in range(10)]
    shares = generator.dirichlet(np.full(10, 0.5), clients)
    return [
        np.array([generator.choice(by_class[label]) for label in generator.choice(10, 20, p=own)])
        for own in shares
    ]


def _power_law(y: np.ndarray, clients: int, generator: np.random.Generator) -> list[Any]:
    """Two labels each; 5 samples of each label, and of the rest a log-normal share (FedProx, appendix C.1)."""
    places = generator.permutation(clients)
    hands: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in range(10):
        holders = np.flatnonzero((label - places) % 10 < 2)
        rows = generator.permutation(np.flatnonzero(y == label))
        draws = generator.lognormal(0.0, 2.0, len(holders))
        ends = np.round(np.cumsum(draws) / draws.sum() * (len(rows) - 5 * len(holders))).astype(int)
        sizes = np.diff(ends, prepend=0) + 5
        for client, part in zip(holders, np.split(rows, np.cumsum(sizes)[:-1]), strict=True):
            hands[client].append(part)
    return [np.concatenate(hand) for hand in hands]
