"""Clients trained many at once: a `CohortTrainer` on stacked tensors, beside the one that trains one by one.

The arithmetic is that of the whole model, however a client's plan cuts it over devices. A cohort's result is a
handful of tensors, `CohortResult`, of which the weighted sums can be added to another's and the rest set beside it,
so a part of a cohort can be trained here and the parts put together; `CohortUpdates` are what the round loop takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from fedmp.aggregate import WeightedMean
from fedmp.client import LocalWork
from fedmp.cohort import (
    ChunkWork,
    Cohort,
    CohortResult,
    CohortTraining,
    FlatLayout,
    Objective,
    Probe,
    flat_layout,
    flat_optimizer,
    own_statistics,
    probe,
)
from fedmp.data import Dataset
from fedmp.engine.cohort_updates import CohortUpdates, Start, Trainee
from fedmp.engine.job import Job
from fedmp.engine.session import Session, plain_evaluation
from fedmp.graph import state_specs
from fedmp.records import Progress
from fedmp.strategy import FedAvg
from fedmp.updates import trained_names

__all__ = ["ManyAtOnce", "is_mean_by_samples", "keeps_at_clients", "try_out", "why_one_by_one"]

_CACHE_BYTES = 8 << 20  # of a chunk; two of them stay in a usual last-level cache
_LEAST_CHUNK = 4
_TELL_S = 0.2


def why_one_by_one(job: Job) -> str:
    """Why a job's clients must be trained one after another, as far as the job tells; empty if they need not."""
    if flat_optimizer(job.optimizer) is None:
        return "its client optimizer is none of torch.optim's SGD, Adam and AdamW"
    strategy = job.strategy
    rule = strategy.local_rule
    if strategy.keeps_optimizer or (rule is not None and (rule.kept or rule.received)):
        return f"the strategy {type(strategy).__name__} keeps a state of each client"
    if job.pipeline.autocast is not None:
        return "mixed precision (pipeline.autocast) is for one client at a time"
    return ""


def keeps_at_clients(job: Job, model: torch.nn.Module) -> str:
    """Why it matters what the clients keep of the model; empty if they keep nothing."""
    if job.strategy.scope(state_specs(model)).keeps_values:
        return f"the strategy {type(job.strategy).__name__} keeps a part of the model at each client"
    return ""


def try_out(
    job: Job, model: torch.nn.Module, data: Dataset, rows: torch.Tensor, *, draws_noise: bool
) -> Probe:
    """Whether the job's model can be trained for many clients at once, tried on a first batch."""
    few = rows[: min(len(rows), job.batch_size, 8)]
    inputs, targets = data.batch(few)
    return probe(model, flat_layout(model), job.task, inputs, targets, draws_noise=draws_noise)


def is_mean_by_samples(job: Job) -> bool:
    """Whether all that the round loop makes of the updates is their mean, weighted by samples processed."""
    is_mean = type(job.aggregator) is WeightedMean and job.attack is None
    weights = getattr(type(job.strategy), "weights", None)
    is_mean = is_mean and job.strategy.server_rule is None
    return is_mean and weights is FedAvg.weights and getattr(job.strategy, "weighting", "") == "processed"


class ManyAtOnce:
    """Trains cohorts of clients at once.

    Args:
        session: the job under way, whose model was found to allow it; told of long rounds' progress.
        chunk: clients at once; None for as many as fit the cache.
        workers: threads; None for torch's number of threads.

    Attributes:
        chunk, workers: as they are.
    """

    def __init__(self, session: Session, *, chunk: int | None, workers: int | None) -> None:
        prepared = session.prepared
        assert prepared.probe is not None
        job, found = prepared.job, prepared.probe
        self._session, self._prepared, self._job = session, prepared, job
        self._layout = flat_layout(prepared.model)
        self._statistics = tuple(own_statistics(prepared.model))
        self._pushed = trained_names(prepared.specs.values())
        optimizer = flat_optimizer(job.optimizer)
        work = ChunkWork(
            optimizer=optimizer,
            objective=Objective(job.task),
            dataset=prepared.data.train,
            learning_rate=job.learning_rate,
            num_rounds=job.rounds,
            max_gradient_norm=job.max_gradient_norm,
            accumulate_batches=job.accumulate_batches,
            num_microbatches=job.num_microbatches if found.mixes_samples else 1,
            pads=not found.mixes_samples,
            rule=job.strategy.local_rule,
        )
        self.workers = workers or torch.get_num_threads()
        copies = 2 + (optimizer.num_buffers if optimizer else 0)
        self.chunk = chunk or _fitting_chunk(self._layout, copies, found, prepared.num_clients)
        self._training = CohortTraining(
            prepared.model,
            self._layout,
            work,
            batch_size=job.batch_size,
            seed=job.seed,
            chunk=self.chunk,
            workers=self.workers,
        )

    def train(
        self,
        cohort: Sequence[Trainee],
        *,
        round: int,
        states: Mapping[str, str],
        handed_out: Mapping[str, torch.Tensor],
        keep: bool,
    ) -> CohortUpdates:
        """Train a cohort.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        start = self.start(handed_out)
        return self.updates(cohort, self.run(cohort, start, round=round, keep=keep), start, round=round)

    def start(self, handed_out: Mapping[str, torch.Tensor]) -> Start:
        """What a round's training starts from, as it is now."""
        moved = {*self._layout.names, *self._statistics}
        return Start(
            handed_out,
            torch.cat([handed_out[name].flatten() for name in self._layout.names]),
            {name: handed_out[name].clone() for name in self._statistics},
            {name: torch.zeros_like(handed_out[name]) for name in self._pushed if name not in moved},
        )

    def run(self, cohort: Sequence[Trainee], start: Start, *, round: int, keep: bool) -> CohortResult:
        """Train a cohort, or a part of one.

        Args:
            cohort: who trains.
            start: from what.
            round: seeds the order of the batches.
            keep: whether each client's own update is wanted, beside their sum.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        works = [one.work.of_round(one.name, round) for one in cohort]
        sizes = [len(one.own_rows) for one in cohort]
        samples = [work.num_examples(size) for work, size in zip(works, sizes, strict=True)]
        members = Cohort(
            clients=[one.name for one in cohort],
            rows=[one.own_rows for one in cohort],
            num_batches=[work.num_batches(size) for work, size in zip(works, sizes, strict=True)],
            weights=samples,
        )
        evaluation = self._evaluate(members, works, start)
        result = self._training.train(
            members,
            start.parameters,
            start.statistics,
            round=round,
            keep=keep,
            on_chunk=self._teller(members.clients, samples, round),
        )
        result.evaluation.copy_(evaluation)
        return result

    def updates(
        self, cohort: Sequence[Trainee], result: CohortResult, start: Start, *, round: int
    ) -> CohortUpdates:
        """What the round loop takes, of the result of a whole cohort."""
        return CohortUpdates(cohort, result, self._layout, start, round=round)

    def close(self) -> None:
        """End the threads."""
        self._training.close()

    def _evaluate(self, cohort: Cohort, works: Sequence[LocalWork], start: Start) -> torch.Tensor:
        """[K, 3] loss, weight and correct predictions of the starting model on each client's data."""
        if not works or not works[0].evaluate_first:
            return torch.zeros(len(works), 3, dtype=torch.float64)
        evaluate = plain_evaluation(self._prepared.model, start.tensors, self._job.task)
        dataset = self._prepared.data.train
        return torch.tensor([evaluate(dataset, own) for own in cohort.rows], dtype=torch.float64)

    def _teller(self, clients: Sequence[str], samples: Sequence[int], round: int) -> Callable[[int], None]:
        """Tells of a long round's progress."""
        told_s, told = time.monotonic(), 0

        def tell(done: int) -> None:
            nonlocal told_s, told
            if time.monotonic() - told_s < _TELL_S:
                return
            for place in range(told, done):
                count = samples[place]
                self._session.observe(Progress(round, clients[place], count, count, math.nan))
            told_s, told = time.monotonic(), done

        return tell


def _fitting_chunk(layout: FlatLayout, copies: int, found: Probe, population: int) -> int:
    """Clients whose weights, gradients, optimizer state and activations fit the cache."""
    per_client = 4 * layout.size * copies + found.activation_bytes
    return max(_LEAST_CHUNK, min(_CACHE_BYTES // max(per_client, 1), population))
