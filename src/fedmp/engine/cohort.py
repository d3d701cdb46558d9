"""The simulator's fast path: the clients of a round trained many at once, as the round loop's `Clients`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from fedmp.aggregate import WeightedMean
from fedmp.client import LocalWork
from fedmp.clock import Clock
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
from fedmp.coordinator import ClientUpdate, Opening, RoundSettings, Trained
from fedmp.engine.job import Job
from fedmp.engine.session import Session, plain_evaluation
from fedmp.engine.simulated_wire import SimulatedWire
from fedmp.engine.traffic import Traffic
from fedmp.engine.unplanned import Unplanned
from fedmp.graph import state_specs
from fedmp.records import DeviceReport, Progress
from fedmp.strategy import FedAvg
from fedmp.updates import trained_names

__all__ = [
    "CohortClients",
    "cohort_settings",
    "keeps_at_clients",
    "local_counts",
    "try_out",
    "why_one_by_one",
]

_CACHE_BYTES = 8 << 20  # of a chunk; two of them stay in a usual last-level cache
_LEAST_CHUNK = 4
_TELL_S = 0.2


def why_one_by_one(job: Job) -> str:
    """Why a job's clients must be trained one after another, as far as the job tells; empty if they need not."""
    if flat_optimizer(job.optimizer) is None:
        return "its client optimizer is none of torch.optim's SGD, Adam and AdamW"
    strategy = job.strategy
    closing = strategy.closing(len(job.topology.clients))
    if strategy.local_rule or strategy.server_rule or strategy.keeps_optimizer or strategy.effort:
        return f"the strategy {type(strategy).__name__} has rules of its own for each client"
    if closing.refills or closing.deadline_s is not None or closing.num_training != closing.wanted:
        return "who is in time for a round's end depends on the clients' plans"
    if job.clock != Clock():
        return "the clock needs the clients' plans"
    if job.pipeline.autocast is not None:
        return "mixed precision (pipeline.autocast) is for one client at a time"
    return ""


def keeps_at_clients(job: Job, model: torch.nn.Module) -> str:
    """Why it matters what the clients keep of the model; empty if they keep nothing."""
    if job.strategy.scope(state_specs(model)).keeps_values:
        return f"the strategy {type(job.strategy).__name__} keeps a part of the model at each client"
    return ""


def local_counts(job: Job) -> LocalWork:
    """How much a client does in a round, which no plan changes."""
    return LocalWork(
        optimizer=job.optimizer,
        schedule=job.schedule,
        batch_size=job.batch_size,
        num_microbatches=job.num_microbatches,
        local_epochs=job.strategy.local_epochs,
        local_steps=job.strategy.local_steps,
        seed=job.seed,
        evaluate_first=job.federated_evaluation or job.strategy.needs_losses,
        accumulate_batches=job.accumulate_batches,
    )


def try_out(job: Job, model: torch.nn.Module, data: Any, rows: torch.Tensor, *, draws_noise: bool) -> Probe:
    """Whether the job's model can be trained for many clients at once, tried on a first batch."""
    few = rows[: min(len(rows), job.batch_size, 8)]
    inputs, targets = data.batch(few)
    return probe(model, flat_layout(model), job.task, inputs, targets, draws_noise=draws_noise)


def cohort_settings(session: Session) -> RoundSettings:
    """What the round loop needs to know of a job without plans."""
    prepared = session.prepared
    assert isinstance(prepared, Unplanned)
    counts = local_counts(prepared.job)
    return RoundSettings(
        clients=tuple(prepared.rows),
        round_samples=_Counted(prepared, counts),
        predicted_s={},
        first_round=session.first_round,
        last_round=prepared.job.rounds,
        seed=prepared.job.seed,
        fingerprint=prepared.fingerprint,
        num_samples=_Sizes(prepared),
        roster=session.roster,
    )


class _Counted(Mapping[str, int]):
    """Samples that each client processes in a round, worked out when asked for."""

    def __init__(self, prepared: Unplanned, counts: LocalWork) -> None:
        self._rows, self._counts = prepared.rows, counts

    def __getitem__(self, name: str) -> int:
        return self._counts.num_examples(self._rows.size(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class _Sizes(Mapping[str, int]):
    """Samples that each client has."""

    def __init__(self, prepared: Unplanned) -> None:
        self._rows = prepared.rows

    def __getitem__(self, name: str) -> int:
        return self._rows.size(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class CohortClients:
    """Clients that are trained many at once and all finish every round.

    Args:
        session: the job under way.
        chunk: clients at once; None for as many as fit the cache.
        workers: threads; None for torch's number of threads.
    """

    def __init__(self, session: Session, *, chunk: int | None, workers: int | None) -> None:
        prepared = session.prepared
        assert isinstance(prepared, Unplanned)
        job = prepared.job
        self._session, self._prepared, self._job = session, prepared, job
        self._layout = flat_layout(prepared.model)
        self._statistics = tuple(own_statistics(prepared.model))
        self._counts = local_counts(job)
        optimizer = flat_optimizer(job.optimizer)
        mixes = prepared.probe.mixes_samples
        work = ChunkWork(
            optimizer=optimizer,
            objective=Objective(job.task),
            dataset=prepared.data.train,
            learning_rate=job.learning_rate,
            num_rounds=job.rounds,
            max_gradient_norm=job.max_gradient_norm,
            accumulate_batches=job.accumulate_batches,
            num_microbatches=job.num_microbatches if mixes else 1,
            pads=not mixes,
        )
        self.workers = workers or torch.get_num_threads()
        copies = 2 + (optimizer.num_buffers if optimizer else 0)
        self.chunk = chunk or _fitting_chunk(
            self._layout, copies, prepared.probe, self.workers, len(prepared.rows)
        )
        self._training = CohortTraining(
            prepared.model,
            self._layout,
            work,
            batch_size=job.batch_size,
            seed=job.seed,
            chunk=self.chunk,
            workers=self.workers,
        )
        self._keeps = not _is_mean_by_samples(job) or bool(job.transforms)
        specs = prepared.specs
        self._pushed = trained_names(specs.values())
        self._wire = SimulatedWire(session, specs)
        self._traffic = Traffic(self._wire.uplink, self._wire.downlink)

    def train(self, opening: Opening) -> Trained:
        """Train the cohort.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        rows, counts = self._prepared.rows, self._counts
        handed_out = self._wire.hand_out(opening.round)
        state = handed_out.tensors
        sizes = [rows.size(name) for name in opening.cohort]
        samples = [counts.num_examples(size) for size in sizes]
        cohort = Cohort(
            clients=opening.cohort,
            rows=[rows[name] for name in opening.cohort],
            num_batches=[counts.num_batches(size) for size in sizes],
            weights=samples,
        )
        evaluation = self._evaluate(cohort, state) if self._counts.evaluate_first else None
        start = torch.cat([state[name].flatten() for name in self._layout.names])
        before = {name: state[name].clone() for name in self._statistics}
        result = self._training.train(
            cohort,
            start,
            before,
            round=opening.round,
            keep=self._keeps,
            on_chunk=self._teller(opening, samples),
        )
        updates = CohortUpdates(
            opening, sizes, samples, result, self._layout, start, before, self._zeros(state), evaluation
        )
        sent: Sequence[ClientUpdate] = updates
        if self._job.transforms:
            decoded = [self._wire.send(update, opening.states.get(update.client, "")) for update in updates]
            sent = [update for update, _ in decoded]
            bytes_up = sum(self._traffic.whole_up(payload) for _, payload in decoded)
        else:
            bytes_up = len(updates) * self._traffic.whole_up({name: state[name] for name in self._pushed})
        bytes_down = len(updates) * self._traffic.whole_down(handed_out.payload)
        return Trained(updates=sent, bytes_up=bytes_up, bytes_down=bytes_down)

    def unreachable(self) -> frozenset[str]:
        """Nobody."""
        return frozenset()

    def committed(self, round: int) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        """End the threads."""
        self._training.close()

    def _zeros(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Updates of buffers that training leaves alone."""
        moved = {*self._layout.names, *self._statistics}
        return {name: torch.zeros_like(state[name]) for name in self._pushed if name not in moved}

    def _evaluate(
        self, cohort: Cohort, state: Mapping[str, torch.Tensor]
    ) -> list[tuple[float, float, float]]:
        """Loss, weight and correct predictions of the round's starting model on each client's data."""
        evaluate = plain_evaluation(self._prepared.model, state, self._job.task)
        dataset = self._prepared.data.train
        return [evaluate(dataset, own) for own in cohort.rows]

    def _teller(self, opening: Opening, samples: Sequence[int]) -> Any:
        """Tells of a long round's progress."""
        told_s, told = time.monotonic(), 0

        def tell(done: int) -> None:
            nonlocal told_s, told
            if time.monotonic() - told_s < _TELL_S:
                return
            for place in range(told, done):
                count = samples[place]
                self._session.observe(Progress(opening.round, opening.cohort[place], count, count, math.nan))
            told_s, told = time.monotonic(), done

        return tell


class CohortUpdates(Sequence[ClientUpdate]):
    """A cohort's updates, which are already summed up where only their mean is wanted.

    Args:
        opening: of the round.
        sizes: samples that each client has.
        samples: that each client processed, its weight in the sum.
        result: of the training.
        layout, start, before: of the parameters, and what they and the statistics were.
        zeros: updates of what did not change.
        evaluation: of the starting model at each client; None without.
    """

    def __init__(
        self,
        opening: Opening,
        sizes: Sequence[int],
        samples: Sequence[int],
        result: CohortResult,
        layout: FlatLayout,
        start: torch.Tensor,
        before: Mapping[str, torch.Tensor],
        zeros: Mapping[str, torch.Tensor],
        evaluation: Sequence[tuple[float, float, float]] | None,
    ) -> None:
        self._samples, self._result, self._layout = samples, result, layout
        self._start, self._before, self._zeros = start, before, zeros
        sums = zip(
            opening.cohort,
            sizes,
            samples,
            result.loss_sums.tolist(),
            result.weights.tolist(),
            result.num_correct.tolist(),
            evaluation or [(0.0, 0.0, 0.0)] * len(samples),
            strict=True,
        )
        self._updates = [
            ClientUpdate(client, opening.round, _Own(self, place), (_report(size, count, *own, *found),))
            for place, (client, size, count, *own, found) in enumerate(sums)
        ]

    @overload
    def __getitem__(self, place: int) -> ClientUpdate: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ClientUpdate]: ...
    def __getitem__(self, place: int | slice) -> ClientUpdate | Sequence[ClientUpdate]:
        return self._updates[place]

    def __len__(self) -> int:
        return len(self._updates)

    def weighted_mean(self, weights: Sequence[float]) -> dict[str, torch.Tensor] | None:
        """The mean of all, without any of them; None if it was summed with other weights."""
        if list(weights) != [float(count) for count in self._samples]:
            return None
        total = float(sum(self._samples))
        mean = self._layout.by_name(self._result.total / total - self._start)
        for name, tensor in self._result.buffers.items():
            mean[name] = _as(tensor / total - self._before[name], self._before[name].dtype)
        return {**mean, **self._zeros}

    def names(self) -> list[str]:
        """The tensors of each update."""
        return [*self._layout.names, *self._before, *self._zeros]

    def of(self, place: int, name: str) -> torch.Tensor:
        """One client's update of one tensor."""
        result = self._result
        if result.parameters.shape[0] == 0:
            raise LookupError("the updates were summed up as they were made")
        if name in self._layout.names:
            change = result.parameters[place] - self._start
            return self._layout.by_name(change)[name]
        if name in self._before:
            return result.own_buffers[name][place] - self._before[name]
        return self._zeros[name]


class _Own(Mapping[str, torch.Tensor]):
    """One client's update, read when asked for."""

    def __init__(self, updates: CohortUpdates, place: int) -> None:
        self._updates, self._place = updates, place

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._updates.of(self._place, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates.names())

    def __len__(self) -> int:
        return len(self._updates.names())


def _report(
    size: int,
    count: int,
    loss: float,
    weight: float,
    correct: float,
    e_loss: float,
    e_weight: float,
    e_correct: float,
) -> DeviceReport:
    # checked values of this process's own: a hundred of them a round need not be checked again
    return DeviceReport.model_construct(
        num_examples=count,
        num_samples=size,
        loss_sum=loss,
        weight=weight,
        num_correct=correct,
        evaluation_loss_sum=e_loss,
        evaluation_weight=e_weight,
        evaluation_correct=e_correct,
    )


def _is_mean_by_samples(job: Job) -> bool:
    """Whether all that the round loop makes of the updates is their mean, weighted by samples processed."""
    is_mean = type(job.aggregator) is WeightedMean and job.attack is None
    weights = getattr(type(job.strategy), "weights", None)
    return is_mean and weights is FedAvg.weights and getattr(job.strategy, "weighting", "") == "processed"


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if dtype.is_floating_point else tensor.round().to(dtype)


def _fitting_chunk(layout: FlatLayout, copies: int, found: Probe, workers: int, population: int) -> int:
    """Clients whose weights, gradients, optimizer state and activations fit the cache."""
    per_client = 4 * layout.size * copies + found.activation_bytes
    return max(_LEAST_CHUNK, min(_CACHE_BYTES // max(per_client, 1), population))
