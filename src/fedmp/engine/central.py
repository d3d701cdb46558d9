"""Centralized training on the pooled data: what a federation is compared with."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from fedmp.cohort import is_small, one_thread
from fedmp.engine.job import Centralized
from fedmp.engine.prepare import Prepared
from fedmp.errors import TrainingError
from fedmp.seeds import derive_seed

__all__ = ["CentralizedResult", "train_centrally"]


@dataclass(frozen=True)
class CentralizedResult:
    """How centralized training went.

    Attributes:
        accuracy: of the final model on the held-out set, 0 to 1; None where the task has none.
        samples: processed in training.
        num_bytes: raw samples that would have to move to one place.
        wall_s: seconds of training.
    """

    accuracy: float | None
    samples: int
    num_bytes: int
    wall_s: float


def train_centrally(prepared: Prepared, settings: Centralized) -> CentralizedResult:
    """Train the same model from the same weights on all clients' samples together.

    Args:
        prepared: the job; its model is not changed.
        settings: optimizer, epochs and batch size.

    Raises:
        TrainingError: the loss is not finite.
    """
    job, train, test = prepared.job, prepared.data.train, prepared.data.test
    started_s = time.monotonic()
    model = copy.deepcopy(prepared.model).train()
    optimizer = settings.optimizer([p for p in model.parameters() if p.requires_grad])
    rates = [group["lr"] for group in optimizer.param_groups]
    batch_size = settings.batch_size or job.batch_size
    budget = _samples(prepared, settings)
    first = train.input_batch(range(min(batch_size, len(train))))
    done = 0
    with one_thread() if is_small(model, first) else nullcontext():
        for epoch, indices in _batches(job.seed, len(train), batch_size):
            inputs, targets = train.batch(indices)
            optimizer.zero_grad(set_to_none=True)
            loss = job.task.loss_sum(model(inputs), targets) / job.task.weight(targets)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss of centralized training is {float(loss.detach())} in epoch {epoch}; lower its "
                    f"learning rate (centralized.optimizer.lr)"
                )
            loss.backward()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * job.learning_rate.factor(done / budget)
            optimizer.step()
            done += len(indices)
            if done >= budget:
                break
    wall_s = time.monotonic() - started_s
    model.eval()
    correct = weight = 0.0
    with torch.no_grad():
        for indices in torch.arange(len(test)).split(500):
            inputs, targets = test.batch(indices)
            correct += job.task.num_correct(model(inputs), targets)
            weight += job.task.weight(targets)
    raw = [tensor for tensor in (train.inputs, train.targets) if tensor is not None]
    return CentralizedResult(
        accuracy=correct / weight if job.task.has_accuracy else None,
        samples=done,
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in raw),
        wall_s=wall_s,
    )


def _batches(seed: int, num_samples: int, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Batches without end, each with the number of its epoch, which goes through all samples in a new order."""
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(derive_seed(seed, "centralized", epoch))
        for indices in torch.randperm(num_samples, generator=generator).split(batch_size):
            yield epoch, indices


def _samples(prepared: Prepared, settings: Centralized) -> int:
    """Samples to process: as many as the whole federation processes, unless epochs are given."""
    if settings.epochs is not None:
        return settings.epochs * len(prepared.data.train)
    job = prepared.job
    names = list(prepared.clients)
    return sum(
        prepared.clients[name].examples_in(round)
        for round in range(1, job.rounds + 1)
        for name in job.strategy.cohort(names, round=round, seed=job.seed)
    )
