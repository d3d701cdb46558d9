"""Whole jobs under attack."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmp import FedmpError, Job
from fedmp.aggregate import Aggregator, CoordinateMedian, MultiKrum, WeightedMean
from fedmp.attacks import Attack, LabelFlip, SignFlip
from fedmp.data import TrainTest
from fedmp.engine.prepare import prepare
from fedmp.models import MLP
from tests.support.jobs import assert_same, images, run, sgd, topology, weights


def job(**changes: Any) -> Job:
    settings: dict[str, Any] = {
        "model": partial(MLP, 784, (24,)),
        "topology": topology(*[1] * 10),
        "data": images(500, 200),
        "optimizer": sgd(0.1),
        "rounds": 6,
        "batch_size": 25,
        "num_microbatches": 1,
    }
    return Job(**{**settings, **changes})


@cache
def accuracy(folder: Path, aggregator: Aggregator, attack: Attack | None) -> float:
    result = run(
        job(aggregator=aggregator, attack=attack, rounds=20), folder / f"{len(list(folder.iterdir()))}"
    )
    found = result.history[-1].test_accuracy
    assert found is not None
    return found


def test_robust_rules_withstand_an_attack_that_the_mean_does_not(tmp_path: Path) -> None:
    clean = accuracy(tmp_path, WeightedMean(), None)
    assert clean > 0.5
    # two of ten clients turn their updates: the mean goes uphill, 0.8 - 0.2 * 5 = -0.2
    assert accuracy(tmp_path, WeightedMean(), SignFlip()) < clean - 0.3
    for robust in (CoordinateMedian(), MultiKrum()):
        assert accuracy(tmp_path, robust, SignFlip()) > clean - 0.05


def test_no_attackers_are_no_attack(tmp_path: Path) -> None:
    plain = run(job(rounds=2), tmp_path / "plain")
    spared = run(job(rounds=2, attack=SignFlip(share=0)), tmp_path / "spared")
    # the simulator sums plain updates as they are made, in another order than those that an attack may change
    assert_same(weights(spared), weights(plain), rtol=1e-5, atol=1e-6)


def test_only_attackers_samples_are_poisoned() -> None:
    attack = LabelFlip(clients=("c3", "c7"))
    clean, poisoned = prepare(job()), prepare(job(attack=attack))
    for name, setup in poisoned.clients.items():
        own, before = setup.own_samples.targets, clean.clients[name].own_samples.targets
        assert own is not None
        assert before is not None
        assert torch.equal(own, 9 - before if name in attack.clients else before)
    test: TrainTest = poisoned.data
    assert torch.equal(test.test.targets, clean.data.test.targets)  # type: ignore[arg-type]


def test_flipped_labels_are_what_is_learnt(tmp_path: Path) -> None:
    """All flip all labels, so the model is right about the flipped ones: hardly ever about the real ones."""
    everyone = LabelFlip(clients=tuple(f"c{index}" for index in range(10)))
    assert accuracy(tmp_path, WeightedMean(), everyone) < 0.1


def test_a_job_names_attackers_that_do_not_exist() -> None:
    with pytest.raises(FedmpError, match=r"attack.clients: there are no clients called zoe"):
        job(attack=SignFlip(clients=("zoe",)))
