"""Tiny jobs on a piece of the shipped excerpt: a federation that trains within a second or two."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmp import Job, Result, Topology
from fedmp.data import ArrayData, FashionMNISTExcerpt, TrainTest
from fedmp.engine import Engine
from fedmp.models import GPT, MLP, ResidualCNN

TINY_MLP = partial(MLP, 784, (16, 12))
TINY_CNN = partial(ResidualCNN, widths=(4, 6))
TINY_GPT = partial(GPT, vocab_size=30, max_length=12, width=16, num_layers=2, num_heads=2)


def sgd(lr: float, momentum: float = 0.0) -> partial[torch.optim.Optimizer]:
    """Makes an SGD optimizer; picklable, as device processes need it."""
    return partial(torch.optim.SGD, lr=lr, momentum=momentum)


@cache
def _excerpt() -> TrainTest:
    return FashionMNISTExcerpt().load()


def images(num_train: int, num_test: int = 40, *, dtype: torch.dtype = torch.uint8) -> ArrayData:
    """The first images of the excerpt; raw, or normalised already if `dtype` is a float."""
    train, test = _excerpt().train, _excerpt().test
    if dtype == torch.uint8:
        for tensor in (train.inputs, train.targets, test.inputs, test.targets):
            assert tensor is not None
        return ArrayData(
            train.inputs[:num_train],
            train.targets[:num_train],
            test.inputs[:num_test],
            test.targets[:num_test],
            mean=train.mean,
            std=train.std,
        )
    (x_train, y_train), (x_test, y_test) = train.batch(range(num_train)), test.batch(range(num_test))
    return ArrayData(x_train.to(dtype), y_train, x_test.to(dtype), y_test)


def tokens(num_train: int, num_test: int = 8, *, seed: int = 0) -> ArrayData:
    """Random sequences of 12 tokens out of 30, each position to be predicted from those before."""
    drawn = torch.randint(0, 30, (num_train + num_test, 13), generator=torch.Generator().manual_seed(seed))
    x, y = drawn[:, :-1], drawn[:, 1:]
    return ArrayData(x[:num_train], y[:num_train], x[num_train:], y[num_train:])


def topology(*num_devices: int) -> Topology:
    """Clients c0, c1, ... with so many equal devices each."""
    return Topology(clients=[{"name": f"c{i}", "devices": count} for i, count in enumerate(num_devices)])


def tiny_job(**changes: Any) -> Job:
    """Two clients with two devices each train a small MLP on 45 images each, with a partial last batch."""
    settings: dict[str, Any] = {
        "model": TINY_MLP,
        "topology": topology(2, 2),
        "data": images(90),
        "partitioner": "uniform",
        "optimizer": sgd(0.05, momentum=0.9),
        "rounds": 2,
        "batch_size": 16,
        "num_microbatches": 3,
    }
    return Job(**{**settings, **changes})


def run(job: Job, run_dir: Path, engine: str | Engine = "simulate", *, resume: bool = False) -> Result:
    """Run a job without a word."""
    return job.run(engine, run_dir=run_dir, resume=resume, observe=lambda _: None)


def weights(model: nn.Module | Result) -> dict[str, torch.Tensor]:
    """Every tensor of a model, or of the final model of a run."""
    module = model.model if isinstance(model, Result) else model
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """The same names and values; bit for bit unless tolerances are given."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
