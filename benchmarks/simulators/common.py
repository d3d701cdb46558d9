"""What all contenders share: the workload, the model, and how they report. Imports nothing of fedmp."""

from __future__ import annotations

import json
import sys
import time

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


def make_model(name: str) -> nn.Module:
    """The workload's model, from the same seed for all."""
    torch.manual_seed(0)
    return {
        "W1": CNN,
        "W2": lambda: MLP(64, 128, 10),
        "W3": lambda: MLP(784, 10),
        "W4": lambda: MLP(784, 200, 200, 10),
    }[name]()


class Work:
    """A workload from its file: arrays, each client's rows, and what to do.

    Args:
        path: an npz that `simulation.py` wrote.
    """

    def __init__(self, path: str) -> None:
        held = np.load(path)
        self.x, self.y = torch.from_numpy(held["x"]), torch.from_numpy(held["y"])
        self.x_test, self.y_test = torch.from_numpy(held["x_test"]), torch.from_numpy(held["y_test"])
        ends = held["ends"].tolist()
        self.rows = [torch.from_numpy(held["rows"][a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        for name, value in json.loads(str(held["settings"])).items():
            setattr(self, name, value)

    def accuracy(self, model: nn.Module) -> float:
        """On the test set."""
        with torch.no_grad():
            return float((model(self.x_test).argmax(1) == self.y_test).float().mean())


class Report:
    """Times of a run; the parent reads the JSON line that `finish` prints."""

    def __init__(self) -> None:
        self.born_s = float(sys.argv[2])
        self.marks = [time.time()]

    def round(self) -> None:
        """A round has ended."""
        self.marks.append(time.time())

    def begin(self) -> None:
        """The first round begins."""
        self.marks = [time.time()]

    def finish(self, accuracy: float, **more: float) -> None:
        """Print what was measured."""
        seconds = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        print(
            "RESULT "
            + json.dumps(
                {"rounds_s": seconds, "startup_s": self.marks[0] - self.born_s, "accuracy": accuracy, **more}
            ),
            flush=True,
        )
