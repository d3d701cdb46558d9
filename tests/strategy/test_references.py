"""Whole runs against plain whole-model loops, written from the papers' algorithms and nothing of fedmp's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedmp import Job
from fedmp import strategy as s
from fedmp.data import Dataset, Dirichlet
from fedmp.data.order import one_pass
from fedmp.models import MLP
from fedmp.seeds import derive_seed
from tests.support.jobs import assert_same, images, run, sgd, tiny_job, topology, weights

# float64 sums of a few thousand terms, over a dozen steps
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}

Tensors = dict[str, torch.Tensor]
Correct = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def initial() -> MLP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLP(784, (16, 12)).double()


def job(strategy: s.Strategy, **changes: Any) -> Job:
    """Four clients of different sizes and shapes, half of them in each round, in float64."""
    settings: dict[str, Any] = {
        "model": initial(),
        "topology": topology(2, 3, 1, 2),
        "data": images(100, dtype=torch.float64),
        "split": Dirichlet(alpha=1.0, min_samples=10),
        "strategy": strategy,
        "optimizer": sgd(0.1),
        "batch_size": 7,
        "rounds": 4,
    }
    return tiny_job(**{**settings, **changes})


@dataclass
class Local:
    """What a client's training came to: its change, and the sum of the coefficients of its gradients."""

    change: Tensors
    num_samples: int
    num_steps: int
    rate_sum: float


@dataclass
class Reference:
    """Clients that train as told, in one process, on whole models."""

    job: Job

    def __post_init__(self) -> None:
        train = self.job.source().load().train
        names = [client.name for client in self.job.topology.clients]
        rows = self.job.split.assign(train, len(names), derive_seed(self.job.seed, "split") % 2**32)
        self.data: dict[str, Dataset] = {n: train.select(r) for n, r in zip(names, rows, strict=True)}
        self.state = weights(initial())

    def cohort(self, round: int) -> tuple[str, ...]:
        return self.job.strategy.cohort(list(self.data), round=round, seed=self.job.seed)

    def loss(self, client: str) -> float:
        model = initial()
        model.load_state_dict(self.state)
        x, y = self.data[client].batch(range(len(self.data[client])))
        return float(F.cross_entropy(model(x), y).detach())

    def train(self, client: str, round: int, correct: Correct, momentum: float = 0.0) -> Local:
        """SGD by hand: the correction is added to the gradient, then momentum, then the step."""
        model, data, job = copy.deepcopy(initial()), self.data[client], self.job
        model.load_state_dict(self.state)
        share = job.strategy.effort.share(client, round=round, seed=job.seed) if job.strategy.effort else 1.0
        batches = -(-len(data) // job.batch_size)
        left = max(1, -int(-(job.strategy.local_epochs * share * batches - 1e-9) // 1))
        velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        local = Local({}, len(data), 0, 0.0)
        rate, coefficient = 0.1, 0.0
        for epoch in range(100):
            order = one_pass(len(data), seed=job.seed, client=client, round=round, epoch=epoch)
            for indices in order.split(job.batch_size)[: left - local.num_steps]:
                x, y = data.batch(indices)
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        assert parameter.grad is not None
                        gradient = correct(name, parameter.grad, parameter, self.state[name])
                        velocity[name] = momentum * velocity[name] + gradient
                        parameter -= rate * velocity[name]
                coefficient = momentum * coefficient + 1
                local.rate_sum += rate * coefficient
                local.num_steps += 1
        local.change = {name: p.detach() - self.state[name] for name, p in model.named_parameters()}
        return local


def plain(name: str, gradient: torch.Tensor, parameter: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return gradient


def add(state: Tensors, update: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor + update[name] for name, tensor in state.items()}


def mean(changes: list[Tensors], shares: list[float]) -> Tensors:
    return {
        name: sum(share * change[name] for share, change in zip(shares, changes, strict=True))
        for name in changes[0]
    }


def fedprox(reference: Reference, mu: float) -> Tensors:
    for round in range(1, 5):
        locals = [
            reference.train(client, round, lambda _, g, w, w0: g + mu * (w - w0))
            for client in reference.cohort(round)
        ]
        total = sum(local.num_samples for local in locals)
        shares = [local.num_samples / total for local in locals]
        reference.state = add(reference.state, mean([local.change for local in locals], shares))
    return reference.state


def scaffold(reference: Reference) -> Tensors:
    """Algorithm 1 with option II, the client's control variate computed at the client as in the paper."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in reference.state.items()}
    c, own = dict(zeros), {client: dict(zeros) for client in reference.data}
    for round in range(1, 5):
        cohort, changes, drifts = reference.cohort(round), [], []
        for client in cohort:
            c_i = own[client]
            local = reference.train(client, round, lambda n, g, w, w0, c_i=c_i, c=c: g - c_i[n] + c[n])  # type: ignore[misc]
            new = {name: c_i[name] - c[name] - local.change[name] / (local.num_steps * 0.1) for name in zeros}
            changes.append(local.change)
            drifts.append({name: new[name] - c_i[name] for name in zeros})
            own[client] = new
        reference.state = add(reference.state, mean(changes, [1 / len(cohort)] * len(cohort)))
        c = add(c, mean(drifts, [1 / len(reference.data)] * len(cohort)))
    return reference.state


def fednova(reference: Reference, rho: float, mu: float = 0.0) -> Tensors:
    def pulled(name: str, gradient: torch.Tensor, w: torch.Tensor, w0: torch.Tensor) -> torch.Tensor:
        return gradient + mu * (w - w0)

    for round in range(1, 5):
        locals = [reference.train(client, round, pulled, rho) for client in reference.cohort(round)]
        total = sum(local.num_samples for local in locals)
        shares = [local.num_samples / total for local in locals]
        norms = [
            (local.num_steps - rho * (1 - rho**local.num_steps) / (1 - rho)) / (1 - rho) for local in locals
        ]
        if mu:  # table 1, without momentum
            norms = [(1 - (1 - 0.1 * mu) ** local.num_steps) / (0.1 * mu) for local in locals]
        tau = sum(share * norm for share, norm in zip(shares, norms, strict=True))
        directions = [
            {name: tensor / norm for name, tensor in local.change.items()}
            for local, norm in zip(locals, norms, strict=True)
        ]
        reference.state = add(reference.state, mean(directions, [tau * share for share in shares]))
    return reference.state


def feddyn(reference: Reference, alpha: float) -> Tensors:
    """Algorithm 1, in terms of the clients' models instead of their changes."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in reference.state.items()}
    h, gradients = dict(zeros), {client: dict(zeros) for client in reference.data}
    for round in range(1, 5):
        cohort, models = reference.cohort(round), []
        for client in cohort:
            g_k = gradients[client]
            local = reference.train(
                client,
                round,
                lambda n, g, w, w0, g_k=g_k: g - g_k[n] + alpha * (w - w0),  # type: ignore[misc]
            )
            models.append(add(reference.state, local.change))
            gradients[client] = {name: g_k[name] - alpha * local.change[name] for name in zeros}
        for name in zeros:
            moved = sum(model[name] - reference.state[name] for model in models)
            h[name] = h[name] - alpha / len(reference.data) * moved
        reference.state = {
            name: sum(model[name] for model in models) / len(models) - h[name] / alpha for name in zeros
        }
    return reference.state


def qfedavg(reference: Reference, q: float) -> Tensors:
    lipschitz = 1 / 0.1
    for round in range(1, 5):
        deltas, h = [], 0.0
        for client in reference.cohort(round):
            loss = reference.loss(client) + 1e-10
            change = reference.train(client, round, plain).change
            step = {name: -lipschitz * tensor for name, tensor in change.items()}
            norm = sum(float(tensor.square().sum()) for tensor in step.values())
            deltas.append({name: loss**q * tensor for name, tensor in step.items()})
            h += q * loss ** (q - 1) * norm + lipschitz * loss**q
        reference.state = add(reference.state, mean(deltas, [-1 / h] * len(deltas)))
    return reference.state


STRAGGLERS = s.Stragglers(fraction=0.5, least=0.2)
CASES: dict[str, tuple[s.Strategy, float, Callable[[Reference], Tensors]]] = {
    "fedprox": (
        s.FedProx(mu=0.3, local_epochs=2, fraction=0.5, effort=STRAGGLERS),
        0.0,
        lambda r: fedprox(r, 0.3),
    ),
    "scaffold": (s.Scaffold(local_epochs=2, fraction=0.5, effort=STRAGGLERS), 0.0, scaffold),
    "fednova": (s.FedNova(local_epochs=2, fraction=0.5, effort=STRAGGLERS), 0.0, lambda r: fednova(r, 0.0)),
    "fednova with momentum": (s.FedNova(fraction=0.5, effort=STRAGGLERS), 0.9, lambda r: fednova(r, 0.9)),
    "fednova with a pull": (
        s.FedNova(mu=0.7, local_epochs=2, fraction=0.5, effort=STRAGGLERS),
        0.0,
        lambda r: fednova(r, 0.0, 0.7),
    ),
    "feddyn": (s.FedDyn(alpha=0.2, fraction=0.5), 0.0, lambda r: feddyn(r, 0.2)),
    "q-fedavg": (s.QFedAvg(q=2.0, fraction=0.5), 0.0, lambda r: qfedavg(r, 2.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_simulated_run_equals_the_papers_algorithm_on_whole_models(case: str, tmp_path: Path) -> None:
    strategy, momentum, reference = CASES[case]
    made = job(strategy, optimizer=sgd(0.1, momentum=momentum))
    result = run(made, tmp_path / "run")
    assert_same(weights(result), reference(Reference(made)), **FLOAT64)


def test_fedprox_without_a_pull_is_federated_averaging_bit_for_bit(tmp_path: Path) -> None:
    pulled = run(job(s.FedProx(mu=0.0), rounds=2), tmp_path / "prox")
    averaged = run(job(s.FedAvg(weighting="samples"), rounds=2), tmp_path / "avg")
    assert_same(weights(pulled), weights(averaged))


def test_fednova_with_equal_work_is_federated_averaging(tmp_path: Path) -> None:
    nova = run(job(s.FedNova(local_steps=3), rounds=2), tmp_path / "nova")
    averaged = run(job(s.FedAvg(local_steps=3, weighting="samples"), rounds=2), tmp_path / "avg")
    assert_same(weights(nova), weights(averaged), **FLOAT64)


def test_q_fedavg_with_q_zero_is_federated_averaging_of_equals(tmp_path: Path) -> None:
    fair = run(job(s.QFedAvg(q=0.0), rounds=2), tmp_path / "fair")
    averaged = run(job(s.FedAvg(weighting="uniform"), rounds=2), tmp_path / "avg")
    assert_same(weights(fair), weights(averaged), **FLOAT64)
