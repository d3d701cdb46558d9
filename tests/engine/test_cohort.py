"""Many clients at once give what one after another gives, and what devices as real processes give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmp import Job, Topology
from fedmp.aggregate import CoordinateMedian
from fedmp.attacks import SignFlip
from fedmp.clock import Clock
from fedmp.coordinator import ClientUpdate, Roster
from fedmp.coordinator.roster import after_round
from fedmp.data import IID, Dirichlet
from fedmp.engine.cohort_updates import CohortUpdates
from fedmp.engine.simulate import SimulateEngine
from fedmp.errors import ConfigError, TrainingError
from fedmp.learning_rate import Cosine
from fedmp.models import CNN, MLP
from fedmp.records import Event, Note
from fedmp.strategy import FedAvg, FedBuff, figures
from fedmp.tasks import MeanLoss
from tests.support.jobs import (
    TINY_CNN,
    TINY_GPT,
    TINY_MLP,
    assert_same,
    images,
    run,
    sgd,
    tiny_job,
    tokens,
    topology,
    weights,
)

# float64, the same operations in another order
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def replayed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of these small models would be replayed after hundreds only."""
    monkeypatch.setattr("fedmp.cohort.passes._WORTH_S", 1e-4)
    monkeypatch.setattr("fedmp.cohort.passes._TIMES", 1)
    monkeypatch.setattr("fedmp.cohort.chunk._WORTH_S", 1e-4)


class Double(nn.Module):
    """A model in float64 that takes images as they come."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.model = make().double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.double() if x.is_floating_point() else x)  # type: ignore[no-any-return]


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.dropout(x.flatten(1), 0.5, self.training))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x.flatten(1))
        return y if float(y.detach().sum()) > 1e9 else 2 * y


class Centred(nn.Module):
    """Samples of a batch see each other, though no layer says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x.flatten(1))
        return y - y.mean(0)


def ragged_job(**changes: Any) -> Job:
    """Six single-device clients of different sizes, with partial batches."""
    settings: dict[str, Any] = {
        "model": partial(Double, TINY_MLP),
        "topology": Topology(clients={"count": 6, "devices": 1}),
        "data": images(200),
        "split": Dirichlet(alpha=1.0, min_samples=3),
        "strategy": FedAvg(local_epochs=2, fraction=0.7),
        "batch_size": 7,
    }
    return tiny_job(**{**settings, **changes})


def mean_squares(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - nn.functional.one_hot(targets, 10)).square().mean()


CASES: dict[str, dict[str, Any]] = {
    "momentum": {},
    "nesterov": {
        "optimizer": partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3)
    },
    "adamw": {"optimizer": partial(torch.optim.AdamW, lr=1e-3)},
    "clipping": {"max_gradient_norm": 0.5},
    "accumulated batches": {"accumulate_batches": 2, "strategy": FedAvg(local_epochs=1.5, fraction=0.7)},
    "steps": {"strategy": FedAvg(local_steps=5)},
    "schedule": {"learning_rate": Cosine()},
    "server optimizer": {"server_optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9)},
    "federated evaluation": {"federated_evaluation": True},
    "convolution": {"model": partial(Double, CNN)},
    "batch norm": {"model": partial(Double, TINY_CNN)},
    "samples that see each other": {"model": partial(Double, Centred)},
    "a loss of one's own": {"task": MeanLoss(function=mean_squares)},
    "another aggregator": {"aggregator": CoordinateMedian()},
    "transformer": {
        "model": partial(Double, TINY_GPT),
        "data": tokens(60),
        "split": IID(),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_many_clients_at_once_give_what_one_after_another_gives(name: str, tmp_path: Path) -> None:
    job = ragged_job(**CASES[name])
    alone = run(job, tmp_path / "alone", SimulateEngine(cohort="sequential"))
    together = run(job, tmp_path / "together", SimulateEngine(cohort="vectorized", chunk=3))
    assert_same(weights(together), weights(alone), **FLOAT64)
    for ours, theirs in zip(together.history, alone.history, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-9)
        assert ours.test_accuracy == theirs.test_accuracy
        assert (ours.federated_loss is None) == (theirs.federated_loss is None)
        if ours.federated_loss is not None:
            assert ours.federated_loss == pytest.approx(theirs.federated_loss, rel=1e-6)
        for field in ("clients", "num_examples", "bytes_up", "bytes_down"):
            assert getattr(ours, field) == getattr(theirs, field)


def uneven(*, devices: int = 1) -> Topology:
    """Six clients, each slower than the one before it."""
    return Topology(
        clients=[
            {"name": f"c{i}", "devices": {"count": devices, "flops_per_s": 1e8 / (i + 1)}} for i in range(6)
        ]
    )


PLANNED: dict[str, dict[str, Any]] = {
    "several devices": {"topology": topology(2, 1, 3)},
    "over-selection": {
        "topology": uneven(),
        "strategy": FedAvg(fraction=0.5, over_selection=0.7, local_steps=2),
    },
    "late updates": {"topology": uneven(), "strategy": FedBuff(buffer_size=2, local_steps=2), "rounds": 4},
    "a clock": {
        "topology": uneven(devices=2),
        "strategy": FedAvg(local_epochs=2, min_clients=1),
        "clock": Clock(compute_sigma=0.2, dropout_probability=0.4, server_bandwidth_bytes_per_s=1e6),
        "attack": SignFlip(share=0.3),
    },
}


@pytest.mark.parametrize("name", PLANNED)
def test_plans_and_the_clock_are_the_same_however_clients_are_trained(name: str, tmp_path: Path) -> None:
    job = ragged_job(**PLANNED[name])
    alone = run(job, tmp_path / "alone", SimulateEngine(cohort="sequential"))
    together = run(job, tmp_path / "together", SimulateEngine(cohort="vectorized", chunk=3))
    assert_same(weights(together), weights(alone), **FLOAT64)
    for ours, theirs in zip(together.history, alone.history, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-9)
        left_out = {"wall_s", "train_loss", "test_loss", "test_accuracy"}
        assert ours.model_dump(exclude=left_out) == theirs.model_dump(exclude=left_out)
        assert ours.simulated_s > 0
    assert {c: p.step_s for c, p in together.plans.items()} == {c: p.step_s for c, p in alone.plans.items()}


def test_late_updates_of_clients_trained_at_once_survive_a_resume(tmp_path: Path) -> None:
    job = ragged_job(**PLANNED["late updates"])
    whole = run(job, tmp_path / "whole", SimulateEngine(cohort="vectorized"))
    run(replace(job, rounds=2), tmp_path / "run", SimulateEngine(cohort="vectorized"))
    resumed = run(job, tmp_path / "run", SimulateEngine(cohort="vectorized"), resume=True)
    assert any(record.stale for record in resumed.history[2:])
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize(("chunk", "workers"), [(1, 1), (2, 1), (6, 1), (2, 2)])
def test_neither_chunks_nor_threads_change_the_result(chunk: int, workers: int, tmp_path: Path) -> None:
    engine = SimulateEngine(cohort="vectorized", chunk=chunk, workers=workers)
    result = run(ragged_job(), tmp_path / "run", engine)
    expected = run(ragged_job(), tmp_path / "alone", SimulateEngine(cohort="sequential"))
    assert_same(weights(result), weights(expected), **FLOAT64)


@pytest.mark.parametrize(("hidden", "threads"), [(8, 1), (200, 2)])
def test_a_cohort_that_computes_little_has_one_thread(
    hidden: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    told = list[Event]()
    job = ragged_job(model=partial(MLP, 784, (hidden,)), rounds=1)
    job.run(SimulateEngine(cohort="vectorized"), run_dir=tmp_path / "run", observe=told.append)
    assert any(f" by {threads} thread(s)" in event.message for event in told if isinstance(event, Note))


def test_many_clients_at_once_give_what_real_processes_give(tmp_path: Path) -> None:
    job = ragged_job(topology=Topology(clients={"count": 3, "devices": 1}))
    together = run(job, tmp_path / "together", SimulateEngine(cohort="vectorized"))
    assert_same(weights(together), weights(run(job, tmp_path / "local", "local")), **FLOAT64)


@pytest.mark.parametrize(("model", "why"), [(Noisy, "random numbers"), (Branching, "values")])
def test_a_model_that_cannot_be_stacked_is_trained_one_after_another_and_the_user_is_told(
    model: type[nn.Module], why: str, tmp_path: Path
) -> None:
    events: list[Event] = []
    job = ragged_job(model=partial(nn.Sequential, model()), leaves=("0",), rounds=1)
    job.run(SimulateEngine(), run_dir=tmp_path / "run", observe=events.append)
    assert any(why in event.message for event in events if isinstance(event, Note))


def test_an_optimizer_that_cannot_be_stacked_changes_the_order_of_sums_alone(tmp_path: Path) -> None:
    job = ragged_job(optimizer=partial(torch.optim.RMSprop, lr=0.001), num_microbatches=3)
    result = run(job, tmp_path / "auto", SimulateEngine())
    as_devices = run(job, tmp_path / "alone", SimulateEngine(cohort="sequential"))
    assert_same(weights(result), weights(as_devices), rtol=1e-7, atol=1e-9)
    assert not torch.equal(
        torch.cat([t.flatten() for t in weights(result).values()]),
        torch.cat([t.flatten() for t in weights(as_devices).values()]),
    ), "batches were cut, which takes longer"


def test_asking_for_what_cannot_be_done_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="values"):
        run(ragged_job(model=Branching), tmp_path / "run", SimulateEngine(cohort="vectorized"))


def test_dropout_may_be_asked_for_and_differs_by_client(tmp_path: Path) -> None:
    result = run(ragged_job(model=Noisy), tmp_path / "run", SimulateEngine(cohort="vectorized"))
    assert all(math.isfinite(record.train_loss) for record in result.history)


def test_a_loss_that_is_not_finite_names_client_round_and_step(tmp_path: Path) -> None:
    job = ragged_job(optimizer=sgd(1e200), model=partial(Double, TINY_MLP))
    with pytest.raises(TrainingError, match=r"client c\d, stage 0, round 1, step 1"):
        run(job, tmp_path / "run", SimulateEngine(cohort="vectorized"))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_the_run_in_whatever_thread_it_comes_up(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def train(*_: object, **__: object) -> None:
        next(calls)
        raise IndexError("as a user's own layer may")

    monkeypatch.setattr("fedmp.cohort.training.ChunkTrainer.train", train)
    with pytest.raises(IndexError, match="own layer"):
        run(ragged_job(), tmp_path / "run", SimulateEngine(workers=workers, chunk=1))
    assert next(calls) <= workers


def test_a_simulated_run_is_resumed_where_it_ended(tmp_path: Path) -> None:
    whole = run(ragged_job(rounds=3), tmp_path / "whole")
    run(ragged_job(rounds=2), tmp_path / "run")
    resumed = run(ragged_job(rounds=3), tmp_path / "run", resume=True)
    assert_same(weights(resumed), weights(whole))


def test_the_same_job_twice_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    first, second = (run(ragged_job(), tmp_path / name) for name in ("first", "second"))
    assert_same(weights(first), weights(second))


def population_job(num_clients: int, **changes: Any) -> Job:
    """Clients with one device and two of few samples each, of whom a hundred train in a round."""
    x, y = torch.randn(2_000, 4), torch.randint(0, 3, (2_000,))
    settings: dict[str, Any] = {
        "model": partial(nn.Linear, 4, 3),
        "topology": Topology(clients={"count": num_clients, "devices": 1}),
        "data": (x, y, x[:10], y[:10]),
        "split": Shared(),
        "strategy": FedAvg(fraction=100 / num_clients),
        "optimizer": sgd(0.1),
        "rounds": 2,
    }
    return Job(**{**settings, **changes})


class Shared:
    """Clients take two rows each, in turn."""

    def assign(self, dataset: Any, num_clients: int, seed: int) -> list[torch.Tensor]:
        return list((torch.arange(2 * num_clients) % len(dataset)).split(2))


def test_a_large_population_is_not_traced_and_planned_once_for_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("fedmp.engine.prepare.trace", refuse)
    result = run(population_job(10_000), tmp_path / "run")
    assert [len(record.clients) for record in result.history] == [100, 100]
    assert result.summary.clients == 10_000
    assert list(result.plans) == ["c0 (and 9999 like it)"]
    (plan,) = result.plans.values()
    link = Topology(clients=[{"name": "c", "devices": 1}]).clients[0].uplink
    down_s = up_s = link.transfer_s((4 * 3 + 3) * 4)
    assert all(record.simulated_s == pytest.approx(down_s + plan.step_s + up_s) for record in result.history)


def test_updates_are_summed_chunk_by_chunk_where_only_their_mean_is_wanted() -> None:
    from fedmp.cohort import (
        ChunkWork,
        Cohort,
        CohortTraining,
        Objective,
        RoundStart,
        flat_layout,
        flat_optimizer,
    )
    from fedmp.data import Dataset, Rows
    from fedmp.learning_rate import Constant
    from fedmp.tasks import CrossEntropy

    model = nn.Linear(4, 3)
    layout = flat_layout(model)
    data = Dataset(torch.randn(60, 4), torch.randint(0, 3, (60,)))
    work = ChunkWork(
        flat_optimizer(sgd(0.1)), Objective(CrossEntropy()), data, Constant(), 1, None, 1, 1, True
    )
    training = CohortTraining(model, layout, work, batch_size=5, seed=0, chunk=2, workers=1)
    rows = Rows(torch.arange(60), [10] * 6)
    cohort = Cohort([f"c{i}" for i in range(6)], rows, np.arange(6), [2] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    summed = training.train(cohort, RoundStart(start, {}), round=1, keep=False)
    kept = training.train(cohort, RoundStart(start, {}), round=1, keep=True)
    training.close()
    assert summed.parameters.numel() == 0
    expected = torch.tensor(cohort.weights) @ kept.parameters
    torch.testing.assert_close(summed.total, expected)


def test_figures_of_a_cohort_are_those_of_each_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []

    def look(roster: Roster, updates: Sequence[ClientUpdate]) -> Roster:
        assert isinstance(updates, CohortUpdates)
        for name in (*ATTRIBUTES, "rate_sum"):
            assert list(figures(updates, name)) == [getattr(update, name) for update in updates], name
        checked.append([update.num_examples for update in updates])
        return after_round(roster, updates)

    monkeypatch.setattr("fedmp.coordinator.rounds.after_round", look)
    for evaluation in (False, True):
        job = ragged_job(rounds=1, federated_evaluation=evaluation)
        job.run(SimulateEngine(chunk=3), run_dir=tmp_path / str(evaluation))
    assert len(set(checked[0])) > 1
    assert len(checked) == 2


ATTRIBUTES = (
    *(
        "client",
        "round",
        "generation",
        "num_examples",
        "num_samples",
        "num_steps",
        "loss",
        "start_loss",
        "loss_sum",
    ),
    *("weight", "evaluation_loss_sum", "evaluation_weight", "evaluation_correct", "pipeline_bytes"),
)


class Counting(nn.Module):
    """A forward that changes something besides tensors, and goes by it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x.flatten(1)) * (1.0 if self.calls < 12 else 0.5)


@pytest.mark.parametrize("model", [TINY_MLP, CNN])
def test_replayed_steps_give_what_the_models_python_gives(model: Any, tmp_path: Path) -> None:
    found = []
    for replay in (True, False):
        told: list[Event] = []
        job = ragged_job(model=partial(Double, model), rounds=2)
        engine = SimulateEngine(replay=replay)
        found.append(job.run(engine, run_dir=tmp_path / str(replay), observe=told.append))
        assert not [event for event in told if isinstance(event, Note) and "own Python" in event.message]
    assert_same(weights(found[0]), weights(found[1]), **FLOAT64)


def test_a_model_whose_steps_cannot_be_replayed_runs_its_python_and_a_note_says_so(tmp_path: Path) -> None:
    found, told = [], list[Event]()
    for replay in (True, False):
        job = ragged_job(model=partial(Double, Counting), rounds=4)
        engine = SimulateEngine(replay=replay, workers=1, chunk=10)
        found.append(job.run(engine, run_dir=tmp_path / str(replay), observe=told.append))
    notes = [event.message for event in told if isinstance(event, Note) and "own Python" in event.message]
    assert notes == [
        "the model's own Python runs in each step: its forward changes something besides tensors"
    ]
    assert_same(weights(found[0]), weights(found[1]), **FLOAT64)
