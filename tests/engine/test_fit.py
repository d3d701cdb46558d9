"""A model, a loss and data that do not fit each other are told before the first round, with their shapes."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmp import Job, Topology
from fedmp.data import Dataset
from fedmp.engine.fit import check_fit
from fedmp.engine.simulate import SimulateEngine
from fedmp.errors import ConfigError
from fedmp.tasks import CrossEntropy, MeanLoss
from tests.support.jobs import run

X, Y = torch.randn(40, 5), torch.arange(40) % 3


class Mismatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Linear(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def job(model: Any, targets: torch.Tensor = Y, *, num_devices: int = 1) -> Job:
    topology = Topology(clients={"count": 2, "devices": num_devices})
    return Job(model=model, topology=topology, data=(X, targets, X, targets), rounds=1)


WRONG = [
    (Mismatched, Y, r"module 'body.1' \(Linear\), at `return self.body\(x\).*\(8x4 and 3x3\)"),
    (
        partial(nn.Linear, 4, 3),
        Y,
        r"Linear does not fit the data: .*\(8x5 and 4x3\).* inputs are \[8, 5\] float32",
    ),
    (partial(nn.Linear, 5, 2), Y, "tells 2 classes apart, 0 to 1, but the targets .* go from 0 to 2"),
    (
        partial(nn.Linear, 5, 3),
        X[:, :2],
        r"loss CrossEntropy .* targets \[8, 2\] float32.* output is \[8, 3\] float32",
    ),
]


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("cohort", ["auto", "sequential"])
@pytest.mark.parametrize(("model", "targets", "message"), WRONG)
def test_what_does_not_fit_is_told_with_its_shapes(
    model: Any, targets: torch.Tensor, message: str, cohort: Any, num_devices: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(job(model, targets, num_devices=num_devices), tmp_path / "run", SimulateEngine(cohort=cohort))


def test_devices_that_are_processes_are_not_started_for_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tells 2 classes apart"):
        run(job(partial(nn.Linear, 5, 2)), tmp_path / "run", "local")


def test_the_check_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_fit(model, CrossEntropy(), Dataset(X, Y), torch.arange(40))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module.training or module._forward_hooks for module in model.modules())


def test_a_class_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="the targets .* go from -1 to 1"):
        check_fit(nn.Linear(5, 3), CrossEntropy(), Dataset(X, Y - 1), torch.arange(40))


def test_targets_that_do_not_count_are_no_classes() -> None:
    model, targets = nn.Linear(5, 3), torch.where(Y == 0, -100, Y)
    check_fit(model, CrossEntropy(), Dataset(X, targets), torch.arange(40))
    check_fit(model, CrossEntropy(), Dataset(X, torch.full_like(Y, -100)), torch.arange(40))
    check_fit(model, MeanLoss(function=nn.functional.mse_loss), Dataset(X, X[:, :3]), torch.arange(40))
