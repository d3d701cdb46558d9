"""Clients trained many at once: a `CohortTrainer` on stacked tensors, beside the one that trains one by one.

The arithmetic is that of the whole model, however a client's plan cuts it over devices. A cohort's result is a
handful of tensors, `CohortResult`, of which the weighted sums can be added to another's and the rest set beside it,
so a part of a cohort can be trained here and the parts put together; `CohortUpdates` are what the round loop takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedmp.aggregate import WeightedMean
from fedmp.client import ClientState, StateStore, Wire, select, usable
from fedmp.cohort import (
    ChunkWork,
    Cohort,
    CohortResult,
    CohortTraining,
    FlatLayout,
    Objective,
    Probe,
    RoundStart,
    flat_layout,
    flat_optimizer,
    own_statistics,
    probe,
)
from fedmp.data import Dataset
from fedmp.engine.cohort_updates import CohortUpdates
from fedmp.engine.job import Job
from fedmp.engine.population import SomeClients
from fedmp.engine.prepare import Prepared
from fedmp.engine.session import Session, plain_evaluation
from fedmp.graph import forward_flops, state_specs
from fedmp.records import Note, Progress, state_key
from fedmp.strategy import FedAvg, Scope, received_name
from fedmp.updates import trained_names

__all__ = ["ManyAtOnce", "deals_out_fragments", "is_mean_by_samples", "try_out", "why_one_by_one"]

_CACHE_BYTES = 16 << 20  # of a chunk; two of them stay in a usual last-level cache
_LEAST_CHUNK = 4
_THREAD_FLOPS = 25e6  # of a cohort's forward, for each thread
_TELL_S = 0.2


def why_one_by_one(job: Job) -> str:
    """Why a job's clients must be trained one after another, as far as the job tells; empty if they need not."""
    if flat_optimizer(job.optimizer) is None:
        return "its client optimizer is none of torch.optim's SGD, Adam and AdamW"
    if job.pipeline.autocast is not None:
        return "mixed precision (pipeline.autocast) is for one client at a time"
    return ""


def deals_out_fragments(job: Job, model: torch.nn.Module) -> str:
    """Why it matters that clients go on with old values of a part of the model; empty if they do not."""
    if job.strategy.scope(state_specs(model)).fragments:
        return f"the strategy {type(job.strategy).__name__} sends the model in fragments, in turn"
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
        workers: threads; None for torch's number of threads, or fewer where a cohort's step is small.
        replays: whether a chunk's steps may be recorded and replayed.

    Attributes:
        chunk, workers: as they are.
    """

    def __init__(
        self, session: Session, *, chunk: int | None, workers: int | None, replays: bool = True
    ) -> None:
        prepared = session.prepared
        assert prepared.probe is not None
        job, found = prepared.job, prepared.probe
        self._session, self._prepared, self._job = session, prepared, job
        self._layout = flat_layout(prepared.model)
        self._statistics = tuple(own_statistics(prepared.model))
        specs = prepared.specs
        moved = {*self._layout.names, *self._statistics}
        self._still = [name for name in trained_names(specs.values()) if name not in moved]
        self._scope = job.strategy.scope(specs)
        self._slots = job.strategy.local_rule.received if job.strategy.local_rule else ()
        self._is_refusal_told = not replays
        self._store = StateStore(session.state_folder, is_durable=False)
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
            keeps_optimizer=job.strategy.keeps_optimizer,
            own=self._scope.own,
            replays=replays,
        )
        cohort = job.strategy.closing(prepared.num_clients).num_training
        self.workers = workers or _worthwhile_threads(prepared, cohort)
        copies = 2 + (optimizer.num_buffers if optimizer else 0) + (len(work.rule.kept) if work.rule else 0)
        self.chunk = chunk or _fitting_chunk(self._layout, copies, found, -(-cohort // self.workers))
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
        cohort: SomeClients,
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
        result = self.run(cohort, start, round=round, states=states, keep=keep)
        return self.updates(cohort, result, start, round=round)

    def start(self, handed_out: Mapping[str, torch.Tensor]) -> RoundStart:
        """What a round's training starts from, as it is now."""
        moved = {*self._layout.names, *self._statistics}
        specs, names = self._prepared.specs, self._layout.names
        return RoundStart(
            parameters=torch.cat([handed_out[name].flatten() for name in names]),
            statistics={name: handed_out[name].clone() for name in self._statistics},
            still={name: handed_out[name] for name in specs if name not in moved},
            received={
                slot: torch.cat([_slot(handed_out, slot, name).flatten() for name in names])
                for slot in self._slots
            },
        )

    def run(
        self,
        cohort: SomeClients,
        start: RoundStart,
        *,
        round: int,
        states: Mapping[str, str],
        keep: bool,
    ) -> CohortResult:
        """Train a cohort, or a part of one.

        Args:
            cohort: who trains.
            start: from what.
            round: seeds the order of the batches.
            states: names what each client kept, from which it starts.
            keep: whether each client's own update is wanted, beside their sum.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        amounts = cohort.amounts(round)
        samples = [amount.examples for amount in amounts]
        members = Cohort(
            clients=cohort.names,
            rows=cohort.rows,
            places=cohort.places,
            num_batches=[amount.batches for amount in amounts],
            weights=samples,
        )
        memory = _Memory(self._store, states, self._scope, tuple(self._prepared.specs), round)
        evaluation = self._evaluate(members, start, memory)
        result = self._training.train(
            members,
            start,
            round=round,
            keep=keep,
            memory=memory,
            on_chunk=self._teller(members.clients, samples, round),
        )
        result.evaluation.copy_(evaluation)
        if self._training.refusal and not self._is_refusal_told:
            self._is_refusal_told = True
            self._session.observe(Note(f"the model's own Python runs in each step: {self._training.refusal}"))
        return result

    def updates(
        self, cohort: SomeClients, result: CohortResult, start: RoundStart, *, round: int
    ) -> CohortUpdates:
        """What the round loop takes, of the result of a whole cohort."""
        return CohortUpdates(
            cohort,
            result,
            self._layout,
            start,
            still=self._still,
            own=self._scope.own,
            round=round,
        )

    def close(self) -> None:
        """End the threads."""
        self._training.close()

    def _evaluate(self, cohort: Cohort, start: RoundStart, memory: _Memory) -> torch.Tensor:
        """[K, 3] loss, weight and correct predictions of what each client starts from, on its data."""
        if not (self._job.federated_evaluation or self._job.strategy.needs_losses):
            return torch.zeros(len(cohort.clients), 3, dtype=torch.float64)
        state = {**self._layout.by_name(start.parameters), **start.statistics, **start.still}
        evaluate = plain_evaluation(self._prepared.model, state, self._job.task)
        dataset, found = self._prepared.data.train, []
        for client, place in zip(cohort.clients, cohort.places.tolist(), strict=True):
            if self._scope.own:
                own = select(memory.load(client), "own/")
                evaluate = plain_evaluation(self._prepared.model, {**state, **own}, self._job.task)
            found.append(evaluate(dataset, cohort.rows[place]))
        return torch.tensor(found, dtype=torch.float64).view(-1, 3)

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


@dataclass(frozen=True, eq=False)
class _Memory:
    """What clients keep, in the store that a client which trains alone uses."""

    store: StateStore
    states: Mapping[str, str]
    scope: Scope
    names: tuple[str, ...]
    round: int

    def load(self, client: str) -> ClientState:
        """What a client can use of its state."""
        key = self.states.get(client, "")
        return usable(
            self.store.load(client, key, wanted=_is_trained),
            self.scope,
            self.names,
            key=key,
            round=self.round,
        )

    def save(self, client: str, state: ClientState) -> None:
        """Keep what its round left."""
        self.store.save(client, state_key(self.round), "all", state, base=self.states.get(client, ""))


def _is_trained(state_name: str) -> bool:
    """Whether a tensor of a state is not of the client's transforms."""
    return not Wire.concerns(state_name)


def _slot(handed_out: Mapping[str, torch.Tensor], slot: str, name: str) -> torch.Tensor:
    """A server's slot of a parameter; zeros for one that stays at the clients."""
    tensor = handed_out.get(received_name(slot, name))
    return torch.zeros_like(handed_out[name]) if tensor is None else tensor


def _worthwhile_threads(prepared: Prepared, cohort: int) -> int:
    """Threads for a cohort: those that compute little would mostly wait for each other's turn at Python."""
    data, most = prepared.data.train, torch.get_num_threads()
    if most == 1:
        return 1
    few = range(min(prepared.job.batch_size, len(data)))
    flops = cohort * forward_flops(prepared.model, data.input_batch(few))
    return max(1, min(int(flops / _THREAD_FLOPS), most))


def _fitting_chunk(layout: FlatLayout, copies: int, found: Probe, most: int) -> int:
    """Clients whose weights, gradients, optimizer state and activations fit the cache; no more than ever train."""
    per_client = 4 * layout.size * copies + found.activation_bytes
    return max(1, min(max(_LEAST_CHUNK, _CACHE_BYTES // max(per_client, 1)), most))
