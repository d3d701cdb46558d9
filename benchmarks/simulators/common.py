"""What all contenders share: the workload, the model, and how they report. Imports nothing of fedmp."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class CNN(nn.Module):
    """8x8 images, two convolutions of 16 and 32 channels, 64 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(512, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class MLP(nn.Module):
    """Fully connected layers of the given widths."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Work:
    """A workload from its file: arrays, each client's rows, and what to do.

    Args:
        path: an npz that `workloads.write` wrote.
    """

    def __init__(self, path: str) -> None:
        held = np.load(path)
        self.x, self.y = torch.from_numpy(held["x"]), torch.from_numpy(held["y"])
        self.x_test, self.y_test = torch.from_numpy(held["x_test"]), torch.from_numpy(held["y_test"])
        self.rows = torch.from_numpy(held["rows"]).tensor_split(torch.from_numpy(held["ends"])[:-1])
        for name, value in json.loads(str(held["settings"])).items():
            setattr(self, name, value)

    def make_model(self) -> nn.Module:
        """The workload's model, from the same seed for all."""
        torch.manual_seed(0)
        return MLP(*self.widths) if self.widths else CNN()

    def accuracy(self, model: nn.Module) -> float:
        """On the test set."""
        with torch.no_grad():
            return float((model(self.x_test).argmax(1) == self.y_test).float().mean())


@functools.cache
def shared_work(path: str) -> Work:
    """A workload, read once in each process that clients visit, rather than sent with every client."""
    return Work(path)


class Report:
    """Times of a run, told line by line, so that a run that is ended has told what it did.

    Args:
        work: the workload: with a target every round is tested, otherwise some of the last ones, whose mean is told.
    """

    def __init__(self, work: Work) -> None:
        self._born_s, self._work = float(sys.argv[2]), work
        self._began_s = self._marked_s = time.time()
        self._reached: dict[str, float] = {}
        self._accuracies: list[float] = []
        self._rounds = 0

    def begin(self) -> None:
        """The first round begins."""
        self._began_s = self._marked_s = time.time()
        print(f"BEGIN {self._began_s - self._born_s}", flush=True)

    def round(self, test: Callable[[], float]) -> bool:
        """A round has ended; returns whether the target is reached.

        Args:
            test: gives the accuracy of the model now; called where that is wanted, within the round's time.
        """
        self._rounds += 1
        target = self._work.target
        work = self._work
        is_late = self._rounds > work.rounds - work.tested
        if target or (is_late and (self._rounds % work.every == 0 or self._rounds == work.rounds)):
            self._accuracies.append(test())
        now_s = time.time()
        print(f"ROUND {now_s - self._marked_s}", flush=True)
        self._marked_s = now_s
        if target and self._accuracies[-1] >= target and not self._reached:
            self._reached = {"target_round": self._rounds, "target_s": now_s - self._began_s}
        return bool(self._reached)

    def finish(self) -> None:
        """All is done."""
        last = self._accuracies[-1:] if self._work.target else self._accuracies
        print("RESULT " + json.dumps({"accuracy": sum(last) / len(last), **self._reached}), flush=True)
