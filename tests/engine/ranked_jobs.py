"""Jobs that one process or several simulate, each a process of its own: `python -m tests.engine.ranked_jobs ...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import PrivateAttr
from safetensors.torch import save_file
from torch import nn

from fedmp import Job, Topology
from fedmp.aggregate import CoordinateMedian
from fedmp.component import Component
from fedmp.data import IID, Dirichlet
from fedmp.engine.ranks import place_in_environment
from fedmp.errors import FedmpError, TrainingError
from fedmp.strategy import FedAdam, FedAvg, PowerOfChoice, Scaffold
from fedmp.updates import TopK


class Poisoned(nn.Module):
    """Its loss is not a number for the samples whose first entry is the largest of all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / (x[:, :1] < 100)  # type: ignore[no-any-return]


class FailsAt(Component):
    """A learning rate that fails at one rank, in the middle of a round.

    Args:
        rank: that fails.
        step: the first at which it does.
    """

    rank: int
    step: int = 30

    _steps: int = PrivateAttr(default=0)

    def factor(self, progress: float) -> float:
        self._steps += 1
        if self._steps > self.step and place_in_environment()[0] == self.rank:
            raise TrainingError("no such luck")
        return 1.0


def base(**changes: Any) -> Job:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(203, 6, generator=generator, dtype=torch.float64)
    y = (x[:, :3].abs() * torch.tensor([1.0, 1.5, 0.5])).argmax(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    job = Job(
        model=model,
        topology=Topology(clients={"count": 9, "devices": 1}),  # type: ignore[arg-type]
        data=(x, y, x[:40], y[:40]),
        split=Dirichlet(alpha=1.0),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.5),
        rounds=3,
        batch_size=4,
        seed=5,
    )
    return replace(job, **changes)


def poisoned() -> Job:
    """The last sample is bad."""
    job = base(model=Poisoned().double(), optimizer=partial(torch.optim.SGD, lr=0.1))
    x, y, x_test, y_test = job.data  # type: ignore[misc]
    x = x.clone()
    x[-1, 0] = 1000.0
    return replace(job, data=(x, y, x_test, y_test))


JOBS: dict[str, Callable[[], Job]] = {
    "mean": base,
    "federated evaluation": lambda: base(federated_evaluation=True, strategy=FedAdam(fraction=0.5)),
    "power of choice": lambda: base(  # who trains goes by each client's own loss
        strategy=FedAvg(fraction=0.5, selection=PowerOfChoice(num_candidates=8))
    ),
    "batch norm": lambda: base(
        model=nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double(),
        split=IID(),
        batch_size=8,
        num_microbatches=1,
    ),
    "median": lambda: base(aggregator=CoordinateMedian()),
    "top-k": lambda: base(transforms=(TopK(fraction=0.3),)),
    "scaffold": lambda: base(strategy=Scaffold(), optimizer=partial(torch.optim.SGD, lr=0.1)),
    "poisoned": poisoned,
}


def run(folder: Path, names: list[str], rounds: int | None, *, resume: bool) -> None:
    """Run jobs one after another; each leaves its weights, of each rank."""
    rank = os.environ.get("RANK", "0")
    for name in names:
        job = JOBS[name]()
        job = job if rounds is None else replace(job, rounds=rounds)
        # the others are told where the run is
        run_dir = folder / name if rank == "0" else folder / f"unused {name} {rank}"
        try:
            result = job.run("simulate", run_dir=run_dir, resume=resume, observe=print_round)
        except FedmpError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            sys.exit(2)
        save_file(dict(result.model.state_dict()), folder / f"{name}.{rank}.safetensors")
        losses = [record.train_loss for record in result.history]
        (folder / f"{name}.{rank}.txt").write_text(f"{losses} {result.summary.final_accuracy}")


def print_round(event: Any) -> None:
    """So that a test knows how far a run is."""
    print(event, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    run(
        Path(given[0]),
        given[1].split(","),
        int(given[2]) if len(given) > 2 else None,
        resume="resume" in given,
    )
