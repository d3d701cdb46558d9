"""Whole runs against hand-written ones: what DESIGN.md calls exact oracles."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedmp import Job, Result, Topology
from fedmp.data import IID, Dataset, Dirichlet
from fedmp.data.order import one_pass
from fedmp.engine import Centralized
from fedmp.models import MLP
from fedmp.seeds import derive_seed
from fedmp.strategy import FedAvg
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

# float32, a dozen optimizer steps of the order of 0.1: another order of summation (one thread or two, tied
# gradients added over the network) moves weights in the 7th digit, and momentum carries that along
FLOAT32 = {"rtol": 1e-4, "atol": 2e-6}
# float64 sums of a few thousand terms
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}


def initial(seed: int = 0, **changes: Any) -> MLP:
    """An MLP in float64 with weights of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(784, (16, 12), **changes).double()


def split_data(job: Job) -> list[Dataset]:
    train = job.source().load().train
    parts = job.split.assign(train, len(job.topology.clients), derive_seed(job.seed, "split") % 2**32)
    return [train.select(rows) for rows in parts]


def hand_written_fedavg(
    job: Job, model: MLP, *, local_epochs: int
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """McMahan et al., 2017, algorithm 1, in a page; returns weights and each round's mean training loss."""
    parts = split_data(job)
    state = weights(model)
    losses = []
    for round in range(1, job.rounds + 1):
        total, seen, loss_sum = {name: torch.zeros_like(w) for name, w in state.items()}, 0, 0.0
        for client, data in zip(job.topology.clients, parts, strict=True):
            local = copy.deepcopy(model)
            local.load_state_dict(state)
            optimizer = job.optimizer(list(local.parameters()))
            for epoch in range(local_epochs):
                order = one_pass(len(data), seed=job.seed, client=client.name, round=round, epoch=epoch)
                for indices in order.split(job.batch_size):
                    x, y = data.batch(indices)
                    optimizer.zero_grad()
                    loss = F.cross_entropy(local(x), y)
                    loss.backward()
                    optimizer.step()
                    loss_sum += float(loss.detach()) * len(indices)
                    seen += len(indices)
            for name, after in local.state_dict().items():
                total[name] += len(data) * (after - state[name])
        state = {name: w + total[name] / sum(map(len, parts)) for name, w in state.items()}
        losses.append(loss_sum / seen)
    return state, losses


@pytest.fixture(scope="module")
def skewed() -> Job:
    """Three clients with different numbers of samples, none a multiple of the batch size, in float64."""
    return tiny_job(
        model=initial(),
        topology=topology(2, 3, 1),
        data=images(100, dtype=torch.float64),
        split=Dirichlet(alpha=1.0, min_samples=10),
        strategy=FedAvg(local_epochs=2),
        batch_size=7,
    )


@pytest.fixture(scope="module")
def skewed_simulated(skewed: Job, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(skewed, tmp_path_factory.mktemp("skewed") / "run")


def test_the_skewed_job_has_clients_of_different_sizes_and_partial_batches(skewed: Job) -> None:
    sizes = [len(part) for part in split_data(skewed)]
    assert len(set(sizes)) == 3
    assert any(size % skewed.batch_size for size in sizes)


def test_a_simulated_run_equals_a_hand_written_fedavg_loop(skewed: Job, skewed_simulated: Result) -> None:
    expected, losses = hand_written_fedavg(skewed, initial(), local_epochs=2)
    assert_same(weights(skewed_simulated), expected, **FLOAT64)
    assert [r.train_loss for r in skewed_simulated.history] == pytest.approx(losses, rel=1e-10)


def test_clients_with_one_two_and_three_devices_give_the_model_of_a_hand_written_loop(
    skewed: Job, tmp_path: Path
) -> None:
    expected, losses = hand_written_fedavg(skewed, initial(), local_epochs=2)
    result = run(skewed, tmp_path / "run", "local")
    assert [result.plans[f"c{i}"].num_stages for i in range(3)] == [2, 3, 1]
    assert_same(weights(result), expected, **FLOAT64)
    assert [r.train_loss for r in result.history] == pytest.approx(losses, rel=1e-10)


def test_a_run_reports_every_sample_that_it_processed(skewed: Job, skewed_simulated: Result) -> None:
    assert [record.num_examples for record in skewed_simulated.history] == [200, 200]
    assert skewed_simulated.summary.samples_processed == 400


def test_a_run_does_not_change_the_module_that_it_was_given(skewed: Job, skewed_simulated: Result) -> None:
    assert isinstance(skewed.model, torch.nn.Module)
    assert_same(weights(skewed.model), weights(initial()))


@pytest.mark.parametrize(
    ("model", "data"),
    [(TINY_MLP, images(90)), (TINY_GPT, tokens(50)), (TINY_CNN, images(50))],
    ids=["mlp", "gpt with tied weights", "cnn with batch norm"],
)
def test_local_and_simulate_give_the_same_model(model: Any, data: Any, tmp_path: Path) -> None:
    job = tiny_job(model=model, data=data, strategy=FedAvg(local_steps=4), federated_evaluation=True)
    simulated, real = run(job, tmp_path / "simulate"), run(job, tmp_path / "local", "local")
    assert_same(weights(real), weights(simulated), **FLOAT32)
    for ours, theirs in zip(real.history, simulated.history, strict=True):
        assert ours.clients == theirs.clients
        assert ours.num_examples == theirs.num_examples
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)
        assert ours.test_loss == pytest.approx(theirs.test_loss, rel=1e-5)
        assert ours.federated_loss == pytest.approx(theirs.federated_loss, rel=1e-5)
        assert ours.federated_accuracy == pytest.approx(theirs.federated_accuracy)


def test_fedsgd_on_all_clients_equals_centralized_gradient_descent(tmp_path: Path) -> None:
    job = tiny_job(
        model=initial(),
        data=images(90, dtype=torch.float64),
        split=Dirichlet(alpha=1.0),
        topology=topology(2, 1, 1),
        strategy=FedAvg(local_steps=1),
        optimizer=sgd(0.1),
        rounds=5,
        batch_size=1000,
    )
    central = initial()
    x, y = job.source().load().train.batch(range(90))
    optimizer = torch.optim.SGD(central.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(central(x), y).backward()
        optimizer.step()
    assert_same(weights(run(job, tmp_path / "run")), weights(central), **FLOAT64)


def test_a_server_sgd_with_learning_rate_one_is_federated_averaging_bit_for_bit(tmp_path: Path) -> None:
    job = tiny_job(model=TINY_CNN, data=images(40))
    averaged = run(job, tmp_path / "averaged")
    stepped = run(tiny_job(model=TINY_CNN, data=images(40), server_optimizer=sgd(1.0)), tmp_path / "stepped")
    assert_same(weights(stepped), weights(averaged))


def test_only_the_cohort_trains_and_it_is_weighted_by_its_own_samples(tmp_path: Path) -> None:
    job = tiny_job(
        model=initial(),
        data=images(90, dtype=torch.float64),
        topology=topology(1, 1, 1, 1, 1),
        strategy=FedAvg(fraction=0.4),
        rounds=1,
    )
    result = run(job, tmp_path / "run")
    cohort = result.history[0].clients
    assert cohort == job.strategy.cohort([f"c{i}" for i in range(5)], round=1, seed=0)
    assert len(cohort) == 2
    parts = dict(zip([f"c{i}" for i in range(5)], split_data(job), strict=True))
    assert result.history[0].num_examples == sum(len(parts[name]) for name in cohort)


def test_a_cohort_of_some_clients_gives_the_same_model_over_real_processes(tmp_path: Path) -> None:
    job = tiny_job(topology=topology(2, 1, 1), strategy=FedAvg(fraction=0.5), rounds=3)
    simulated, real = run(job, tmp_path / "simulate"), run(job, tmp_path / "local", "local")
    assert [r.clients for r in real.history] == [r.clients for r in simulated.history]
    assert {len(record.clients) for record in real.history} == {2}
    assert len({record.clients for record in real.history}) > 1, "every client should get its turn"
    assert_same(weights(real), weights(simulated), **FLOAT32)


def test_another_seed_gives_another_model_and_the_same_seed_the_same(tmp_path: Path) -> None:
    first = run(tiny_job(model=initial(), data=images(40, dtype=torch.float64)), tmp_path / "a")
    again = run(tiny_job(model=initial(), data=images(40, dtype=torch.float64)), tmp_path / "b")
    other = run(tiny_job(model=initial(), data=images(40, dtype=torch.float64), seed=1), tmp_path / "c")
    assert_same(weights(again), weights(first))
    assert not torch.equal(weights(other)["head.weight"], weights(first)["head.weight"])


def test_the_model_is_tested_as_often_as_wanted_and_in_the_end(tmp_path: Path) -> None:
    job = tiny_job(rounds=5)
    always = job.run("simulate", run_dir=tmp_path / "always")
    seldom = replace(job, evaluate_every=2).run("simulate", run_dir=tmp_path / "seldom")
    assert_same(weights(seldom), weights(always))
    for one, other in zip(seldom.history, always.history, strict=True):
        is_tested = one.round in (2, 4, 5)
        expected = (other.test_loss, other.test_accuracy) if is_tested else (None, None)
        assert (one.test_loss, one.test_accuracy) == expected


def test_federated_evaluation_is_of_the_starting_model_on_the_clients_own_data(tmp_path: Path) -> None:
    model = initial()
    job = tiny_job(
        model=model,
        data=images(90, dtype=torch.float64),
        split=Dirichlet(alpha=1.0),
        federated_evaluation=True,
    )
    record = run(job, tmp_path / "run").history[0]
    x, y = job.source().load().train.batch(range(90))  # the clients hold these samples and no others
    with torch.no_grad():
        logits = model.eval()(x)
    assert record.federated_loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-10)
    assert record.federated_accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))


def test_without_federated_evaluation_there_are_no_federated_values(skewed_simulated: Result) -> None:
    assert {record.federated_loss for record in skewed_simulated.history} == {None}
    assert {record.federated_accuracy for record in skewed_simulated.history} == {None}


def test_the_held_out_loss_and_accuracy_are_those_of_the_final_model(
    skewed: Job, skewed_simulated: Result
) -> None:
    test = skewed.source().load().test
    x, y = test.batch(range(len(test)))
    with torch.no_grad():
        logits = skewed_simulated.model(x)
    assert skewed_simulated.history[-1].test_loss == pytest.approx(
        float(F.cross_entropy(logits, y)), rel=1e-10
    )
    assert skewed_simulated.summary.final_accuracy == float((logits.argmax(1) == y).double().mean())


def test_batch_norm_statistics_are_averaged_with_the_samples_as_weights(tmp_path: Path) -> None:
    job = tiny_job(
        model=TINY_CNN, data=images(60), split=Dirichlet(alpha=1.0), rounds=1, strategy=FedAvg(local_steps=1)
    )
    averaged = weights(run(job, tmp_path / "both"))
    shares = [min(job.batch_size, len(part)) for part in split_data(job)]
    alone = []
    for index in range(2):
        part = split_data(job)[index]
        single = tiny_job(
            model=TINY_CNN,
            data=_with_train(job, part),
            topology=Topology(clients=[topology(1, 1).clients[index]]),
            split=_InOrder(),
            rounds=1,
            strategy=FedAvg(local_steps=1),
        )
        alone.append(weights(run(single, tmp_path / str(index))))
    for name in ("stem.1.running_mean", "stem.1.running_var"):
        expected = sum(s * w[name].double() for s, w in zip(shares, alone, strict=True)) / sum(shares)
        torch.testing.assert_close(averaged[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_batch_norm_statistics_kept_local_leave_the_servers_as_they_began(tmp_path: Path) -> None:
    job = tiny_job(
        model=TINY_CNN,
        data=images(40),
        strategy=FedAvg(local_steps=2, keep_statistics_local=True),
        federated_evaluation=True,
    )
    simulated, real = run(job, tmp_path / "simulate"), run(job, tmp_path / "local", "local")
    for result in (simulated, real):
        final = weights(result)
        assert torch.equal(final["stem.1.running_mean"], torch.zeros(4))
        assert torch.equal(final["stem.1.running_var"], torch.ones(4))
        assert final["stem.1.num_batches_tracked"] == 0
    assert_same(weights(real), weights(simulated), **FLOAT32)
    # the second round's evaluation uses each client's own statistics, so equality shows that they are kept
    assert real.history[1].federated_loss == pytest.approx(simulated.history[1].federated_loss, rel=1e-5)


def test_statistics_kept_local_are_those_of_the_clients_own_first_round(tmp_path: Path) -> None:
    """One client alone: its second evaluation is of the averaged weights with its own statistics."""
    common = {"model": TINY_CNN, "data": images(40), "topology": topology(1), "optimizer": sgd(0.05)}
    job = tiny_job(
        **common, strategy=FedAvg(local_steps=2, keep_statistics_local=True), federated_evaluation=True
    )
    shared = tiny_job(**common, strategy=FedAvg(local_steps=2), federated_evaluation=True)
    # with one client, averaging its statistics and keeping them are the same thing to the client itself
    kept, averaged = run(job, tmp_path / "kept"), run(shared, tmp_path / "averaged")
    assert kept.history[1].federated_loss == pytest.approx(averaged.history[1].federated_loss, rel=1e-6)
    assert kept.history[1].test_loss != pytest.approx(averaged.history[1].test_loss, rel=1e-3)


@pytest.mark.parametrize(("steps", "examples"), [(1, 16), (3, 45), (4, 61), (7, 45 * 2 + 16)])
def test_local_steps_go_round_the_data_and_count_what_they_process(
    steps: int, examples: int, tmp_path: Path
) -> None:
    job = tiny_job(strategy=FedAvg(local_steps=steps), rounds=1)
    assert run(job, tmp_path / "run").history[0].num_examples == 2 * examples


def test_centralized_training_processes_as_many_samples_as_the_federation(tmp_path: Path) -> None:
    job = tiny_job(centralized=Centralized(optimizer=sgd(0.05)), strategy=FedAvg(local_epochs=2))
    summary = run(job, tmp_path / "run").summary
    assert summary.centralized_samples == summary.samples_processed == 2 * 2 * 90
    assert summary.centralized_accuracy is not None
    assert summary.accuracy_gap_points == pytest.approx(
        100 * (summary.centralized_accuracy - summary.final_accuracy)
    )


def test_an_adaptive_client_optimizer_starts_anew_each_round(tmp_path: Path) -> None:
    job = tiny_job(
        model=initial(),
        data=images(60, dtype=torch.float64),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        split=IID(),
    )
    expected, _ = hand_written_fedavg(job, initial(), local_epochs=1)
    assert_same(weights(run(job, tmp_path / "run")), expected, **FLOAT64)


class _InOrder:
    """All samples to the only client."""

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> list[torch.Tensor]:
        assert num_clients == 1
        return [torch.arange(len(dataset))]


def _with_train(job: Job, part: Dataset) -> Any:
    class Source:
        def load(self) -> Any:
            from fedmp.data import TrainTest

            return TrainTest(part, job.source().load().test)

    return Source()
