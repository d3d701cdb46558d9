"""A cohort's round: its clients sorted into chunks, the chunks trained by a few threads, the results gathered.

Shape letters: K clients of the cohort, P trained parameters.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn

from fedmp.cohort.batches import draw_batches
from fedmp.cohort.carried import Memory
from fedmp.cohort.chunk import ChunkTrainer, ChunkWork
from fedmp.cohort.module import FlatLayout, StackedModule
from fedmp.cohort.start import RoundStart
from fedmp.errors import TrainingError
from fedmp.pipeline import keep_freed

__all__ = ["Cohort", "CohortResult", "CohortTraining"]


@dataclass(frozen=True, eq=False)
class Cohort:
    """Who trains, on what.

    Attributes:
        clients: their names.
        rows: each one's rows of the data set.
        num_batches: of each in this round.
        weights: of each in the mean.
    """

    clients: Sequence[str]
    rows: Sequence[torch.Tensor]
    num_batches: Sequence[int]
    weights: Sequence[float]


@dataclass(frozen=True, eq=False)
class CohortResult:
    """What a cohort's training gave.

    Attributes:
        loss_sums, weights, num_correct, rate_sums: [K] sums over each client's round.
        evaluation: [K, 3] zeros, for whoever evaluates the starting model: its loss, weight and correct
            predictions.
        total: [P] the clients' trained parameters times their weights, summed.
        buffers: statistics alike, by name.
        parameters: [K, P] each client's trained parameters, if they were to be kept, else empty.
        own_buffers: [K, ...] each client's statistics alike.
    """

    loss_sums: torch.Tensor
    weights: torch.Tensor
    num_correct: torch.Tensor
    rate_sums: torch.Tensor
    evaluation: torch.Tensor
    total: torch.Tensor
    buffers: Mapping[str, torch.Tensor]
    parameters: torch.Tensor
    own_buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)


class CohortTraining:
    """Trains cohorts.

    Args:
        model: one client's.
        layout: of its trained parameters.
        work: what each client does.
        batch_size, seed: of the clients' batches.
        chunk: clients at once.
        workers: threads, each with the memory of a chunk.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: FlatLayout,
        work: ChunkWork,
        *,
        batch_size: int,
        seed: int,
        chunk: int,
        workers: int,
    ) -> None:
        self._layout = layout
        self._batch_size, self._seed, self._chunk = batch_size, seed, chunk
        self._num_workers = workers
        self._every, self._is_remembered = work.accumulate_batches, work.is_remembered
        self._is_over = threading.Event()
        keep_freed()
        self._free: queue.SimpleQueue[ChunkTrainer] = queue.SimpleQueue()
        num_buffers = work.optimizer.num_buffers if work.optimizer else 0
        self._trainers = [
            ChunkTrainer(StackedModule(model, layout, chunk, num_buffers), work, self._is_over)
            for _ in range(workers)
        ]
        for trainer in self._trainers:
            self._free.put(trainer)
        # each thread computes alone: two that share every operation wait for each other all the time, and for
        # whatever else wants a core; one of them that is put off then puts off both
        self._pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    @property
    def refusal(self) -> str:
        """Why steps are not replayed; empty if they are, or may yet be."""
        return next((t.passes.refusal for t in self._trainers if t.passes.refusal), "")

    def close(self) -> None:
        """End the threads, which an interrupt or an error may have left in the middle of a round."""
        self._is_over.set()
        self._pool.shutdown(cancel_futures=True)

    def train(
        self,
        cohort: Cohort,
        start: RoundStart,
        *,
        round: int,
        keep: bool,
        memory: Memory | None = None,
        on_chunk: Callable[[int], None] = lambda _: None,
    ) -> CohortResult:
        """Train one round.

        Args:
            cohort: who trains.
            start: the global model.
            round: seeds the order of the batches.
            keep: whether each client's own result is wanted.
            memory: of the clients; needed where they carry something from round to round.
            on_chunk: told how many clients are done.

        Raises:
            TrainingError: a client's loss or weights are not finite.
            CannotStackError: the model cannot be run for many clients at once.
        """
        result = self._empty(cohort, start.parameters, start.statistics, keep)
        # equal work side by side, the longest first: less padding, and threads that end together
        sizes = [
            (-count, -rows.shape[0]) for count, rows in zip(cohort.num_batches, cohort.rows, strict=True)
        ]
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        chunks = _cut(order, self._chunk, self._num_workers)

        def run(members: Sequence[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            trainer = self._free.get()
            try:
                return self._train_chunk(trainer, cohort, members, start, round, result, memory)
            finally:
                self._free.put(trainer)

        done, sums = 0, []
        for members, summed in zip(chunks, self._pool.map(run, chunks), strict=True):
            sums.append(summed)
            done += len(members)
            on_chunk(done)
        for total, statistics in sums:  # not before all threads are done: each has a core by itself
            result.total.add_(total)
            for name, tensor in statistics.items():
                result.buffers[name].add_(tensor)
        if not bool(torch.isfinite(result.total).all()):
            raise TrainingError(_explain("the weights are", cohort, round))
        return result

    def _empty(
        self, cohort: Cohort, start: torch.Tensor, buffers: Mapping[str, torch.Tensor], keep: bool
    ) -> CohortResult:
        clients = len(cohort.clients)
        wide = torch.float64
        return CohortResult(
            loss_sums=torch.zeros(clients, dtype=wide),
            weights=torch.zeros(clients, dtype=wide),
            num_correct=torch.zeros(clients, dtype=wide),
            rate_sums=torch.zeros(clients, dtype=wide),
            evaluation=torch.zeros(clients, 3, dtype=wide),
            total=torch.zeros_like(start),
            buffers={name: torch.zeros_like(tensor, dtype=wide) for name, tensor in buffers.items()},
            parameters=start.new_empty((clients, len(start)) if keep else (0, len(start))),
            own_buffers={n: t.new_empty((clients, *t.shape)) for n, t in buffers.items()} if keep else {},
        )

    def _train_chunk(
        self,
        trainer: ChunkTrainer,
        cohort: Cohort,
        members: Sequence[int],
        start: RoundStart,
        round: int,
        result: CohortResult,
        memory: Memory | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Train some of the cohort; returns their weighted sums, in the memory of nobody."""
        module = trainer.module
        clients = [cohort.clients[k] for k in members]
        batches = draw_batches(
            clients,
            [cohort.rows[k] for k in members],
            [cohort.num_batches[k] for k in members],
            batch_size=self._batch_size,
            seed=self._seed,
            round=round,
        )
        module.load(start.parameters, start.statistics, len(members))
        if memory is not None and self._is_remembered:
            trainer.carried.begin([memory.load(client) for client in clients])
        trained = trainer.train(batches, start, round=round)
        _check(trained.losses, clients, round)
        if memory is not None and self._is_remembered:
            num_steps = [-(-count // self._every) for count in batches.num_batches]
            states = trainer.carried.end(num_steps, trained.rate_sums, start)
            for client, state in zip(clients, states, strict=True):
                memory.save(client, state)
        places = torch.tensor(members)
        result.loss_sums[places] = trained.loss_sums.double()
        result.weights[places] = trained.weights.double()
        result.num_correct[places] = trained.num_correct.double()
        result.rate_sums[places] = trained.rate_sums
        if result.parameters.shape[0]:
            result.parameters[places] = module.parameters.rows(len(members))
        weights = torch.tensor([cohort.weights[k] for k in members], dtype=torch.float64)
        statistics = {}
        for name, buffer in module.buffers.items():
            own = buffer[: len(members)]
            if name in result.own_buffers:
                result.own_buffers[name][places] = own
            statistics[name] = torch.tensordot(weights, own.double(), 1)
        shares = weights.to(result.total.dtype)
        total = torch.cat([torch.mv(part[: len(members)].t(), shares) for part in module.parameters.parts])
        return total, statistics


def _cut(order: Sequence[int], most: int, workers: int) -> list[Sequence[int]]:
    """Chunks of equal size, of at most so many clients, as many for each worker."""
    count = -(-len(order) // most)
    count = min(-(-count // workers) * workers, len(order))
    size = -(-len(order) // count)
    return [order[i : i + size] for i in range(0, len(order), size)]


def _check(losses: torch.Tensor, clients: Sequence[str], round: int) -> None:
    """Every loss of every step, [S, K], is finite.

    Raises:
        TrainingError: one is not.
    """
    if bool(torch.isfinite(losses.sum())):
        return
    bad = (~torch.isfinite(losses)).nonzero()
    step, client = bad[0].tolist()
    raise TrainingError(
        f"the loss is {float(losses[step, client])} at client {clients[client]}, stage 0, round {round}, "
        f"step {step}; lower the learning rate (optimizer.lr) or check the client's data"
    )


def _explain(what: str, cohort: Cohort, round: int) -> str:
    return (
        f"{what} not finite any more at one of {len(cohort.clients)} clients ({cohort.clients[0]}, ...) after "
        f"round {round}; lower the learning rate (optimizer.lr) or check the clients' data"
    )
