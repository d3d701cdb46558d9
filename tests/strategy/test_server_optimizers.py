"""The server's optimizers against torch's own, and Yogi against numpy."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmp import strategy as s
from fedmp.strategy import Yogi
from tests.support.jobs import assert_same, images, run, sgd, tiny_job, weights

PAIRS = {
    "fedavgm": (s.FedAvgM(momentum=0.7), sgd(1.0, momentum=0.7)),
    "fedadam": (s.FedAdam(server_rate=0.02), partial(torch.optim.Adam, lr=0.02, betas=(0.9, 0.99), eps=1e-3)),
    "fedadagrad": (
        s.FedAdagrad(),
        partial(torch.optim.Adagrad, lr=0.1, eps=1e-3, initial_accumulator_value=1e-6),
    ),
    "diloco": (
        s.DiLoCo(local_steps=2),
        partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    ),
}


@pytest.mark.parametrize(
    "name", ["fedadam", *(pytest.param(n, marks=pytest.mark.slow) for n in PAIRS if n != "fedadam")]
)
def test_a_strategys_server_optimizer_is_torchs_on_the_pseudo_gradient(name: str, tmp_path: Path) -> None:
    strategy, optimizer = PAIRS[name]
    plain = s.FedAvg(local_steps=strategy.local_steps, weighting=strategy.weighting)
    if name == "diloco":
        plain = strategy.model_copy(update={"server_rate": 0.1})  # the job's own is used instead
    ours = run(tiny_job(strategy=strategy, data=images(60)), tmp_path / "ours")
    theirs = run(tiny_job(strategy=plain, data=images(60), server_optimizer=optimizer), tmp_path / "theirs")
    assert_same(weights(ours), weights(theirs))


def test_yogi_is_its_papers_recursion() -> None:
    random = np.random.default_rng(0)
    w, m, v = random.standard_normal(5), np.zeros(5), np.full(5, 1e-6)
    parameter = torch.nn.Parameter(torch.from_numpy(w.copy()))
    optimizer = Yogi([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-3)
    for _ in range(10):
        g = random.standard_normal(5)
        m = 0.9 * m + 0.1 * g
        v = v - 0.01 * g**2 * np.sign(v - g**2)
        w = w - 0.1 * m / (np.sqrt(v) + 1e-3)
        parameter.grad = torch.from_numpy(g.copy())
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-12)


def test_yogi_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="betas in"):
        Yogi([torch.nn.Parameter(torch.zeros(1))], betas=(1.0, 0.9))
