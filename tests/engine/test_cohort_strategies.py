"""Every strategy, with what its clients keep: many at once, one after another, and half of the rounds each way."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmp import strategy as s
from fedmp.engine.simulate import SimulateEngine
from fedmp.learning_rate import Cosine
from tests.engine.test_cohort import FLOAT64, Double, ragged_job
from tests.support.jobs import TINY_CNN, TINY_MLP, assert_same, run, sgd, weights

MOST = {"fraction": 0.6, "local_epochs": 1.5}
CASES: dict[str, dict[str, Any]] = {
    "SCAFFOLD": {"strategy": s.Scaffold(**MOST)},
    "kept moments": {
        "strategy": s.DiLoCo(fraction=0.6, local_steps=3),
        "optimizer": partial(torch.optim.AdamW, lr=2e-3),
    },
}
MORE: dict[str, dict[str, Any]] = {
    "FedBN": {"strategy": s.FedBN(**MOST), "model": partial(Double, TINY_CNN), "federated_evaluation": True},
    "FedProx": {"strategy": s.FedProx(mu=0.1, effort=s.Stragglers(), **MOST)},
    "FedDyn": {"strategy": s.FedDyn(**MOST), "optimizer": sgd(0.05)},
    "FedNova": {"strategy": s.FedNova(effort=s.Factors(clients={"c1": 0.4}), **MOST)},
    "q-FedAvg": {"strategy": s.QFedAvg(**MOST)},
    "FedAdam": {"strategy": s.FedAdam(**MOST)},
    "FedYogi": {"strategy": s.FedYogi(**MOST)},
    "FedAdagrad": {"strategy": s.FedAdagrad(**MOST)},
    "FedAvgM": {"strategy": s.FedAvgM(**MOST)},
    "FedBuff": {"strategy": s.FedBuff(buffer_size=2, local_steps=2)},
    "SCAFFOLD with a schedule": {"strategy": s.Scaffold(**MOST), "learning_rate": Cosine()},
    "own head": {"strategy": s.FedAvg(keep_local=("*head*",), **MOST)},
    "own statistics": {
        "strategy": s.FedAvg(keep_statistics_local=True, **MOST),
        "model": partial(Double, TINY_CNN),
    },
    "damped kept momentum": {
        "strategy": s.DiLoCo(fraction=0.6, local_steps=3),
        "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.5),
    },
    "SCAFFOLD with a head of its own": {
        "strategy": s.Scaffold(keep_local=("*head*",), **MOST),
        "max_gradient_norm": 1.0,
        "accumulate_batches": 2,
    },
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_strategy_is_the_same_however_its_clients_are_trained(name: str, tmp_path: Path) -> None:
    settings = {"model": partial(Double, TINY_MLP), "rounds": 4, **{**CASES, **MORE}[name]}
    job = ragged_job(**settings)
    alone = run(job, tmp_path / "alone", SimulateEngine(cohort="sequential"))
    at_once = SimulateEngine(cohort="vectorized", chunk=3)
    together = run(job, tmp_path / "together", at_once)
    assert_same(weights(together), weights(alone), **FLOAT64)
    for ours, theirs in zip(together.history, alone.history, strict=True):
        if theirs.federated_loss is not None:
            assert ours.federated_loss == pytest.approx(theirs.federated_loss, rel=1e-6)
        for field in ("clients", "num_examples", "bytes_up", "bytes_down"):
            assert getattr(ours, field) == getattr(theirs, field)

    if isinstance(job.learning_rate, Cosine):  # a shorter run has other rates
        return
    run(replace(job, rounds=2), tmp_path / "half", at_once)
    rest = run(job, tmp_path / "half", SimulateEngine(cohort="sequential"), resume=True)
    assert_same(weights(rest), weights(alone), **FLOAT64)


def test_a_run_begun_one_by_one_goes_on_many_at_once(tmp_path: Path) -> None:
    job = ragged_job(model=partial(Double, TINY_MLP), rounds=4, **CASES["kept moments"])
    alone = run(job, tmp_path / "alone", SimulateEngine(cohort="sequential"))
    run(replace(job, rounds=2), tmp_path / "half", SimulateEngine(cohort="sequential"))
    rest = run(job, tmp_path / "half", SimulateEngine(cohort="vectorized"), resume=True)
    assert_same(weights(rest), weights(alone), **FLOAT64)
