"""A cohort's round: its clients sorted into chunks, the chunks trained by a few threads, the results gathered.

Shape letters: K clients of the cohort, P trained parameters.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedmp.cohort.batches import ChunkBatches, CohortBatches
from fedmp.cohort.carried import Memory
from fedmp.cohort.chunk import ChunkTrainer, ChunkWork
from fedmp.cohort.module import FlatLayout, StackedModule
from fedmp.cohort.start import RoundStart
from fedmp.cohort.threads import one_thread
from fedmp.data import Rows
from fedmp.errors import TrainingError
from fedmp.pipeline import keep_freed

__all__ = ["Cohort", "CohortResult", "CohortTraining"]


@dataclass(frozen=True, eq=False)
class Cohort:
    """Who trains, on what.

    Attributes:
        clients: their names.
        rows: everybody's rows of the data set.
        places: [K] of the clients among those.
        num_batches: of each in this round.
        weights: of each in the mean.
    """

    clients: Sequence[str]
    rows: Rows
    places: npt.NDArray[np.int64]
    num_batches: Sequence[int]
    weights: Sequence[float]


@dataclass(frozen=True, eq=False)
class CohortResult:
    """What a cohort's training gave.

    Attributes:
        figures: [4, K] sums over each client's round; see `ChunkResult`.
        evaluation: [K, 3] zeros, for whoever evaluates the starting model: its loss, weight and correct
            predictions.
        total: [P] the clients' trained parameters times their weights, summed.
        buffers: statistics alike, by name.
        parameters: [K, P] each client's trained parameters, if they were to be kept, else empty.
        own_buffers: [K, ...] each client's statistics alike.
    """

    figures: torch.Tensor
    evaluation: torch.Tensor
    total: torch.Tensor
    buffers: Mapping[str, torch.Tensor]
    parameters: torch.Tensor
    own_buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)


_Sums: TypeAlias = tuple[torch.Tensor, list[torch.Tensor]]  # of parameters and statistics


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
        # whatever else wants a core; one of them that is put off then puts off both. The caller's is one of them
        others = max(workers - 1, 1)
        self._pool = ThreadPoolExecutor(others, initializer=torch.set_num_threads, initargs=(1,))

    @property
    def refusal(self) -> str:
        """Why steps are not replayed; empty if they are, or may yet be."""
        refusals = (trainer.passes.replays.refusal for trainer in self._trainers)
        return next(filter(None, refusals), "")

    def close(self) -> None:
        """End the threads, which an interrupt or an error may have left in the middle of a round."""
        self._is_over.set()
        self._pool.shutdown(cancel_futures=True)

    @one_thread()  # what the caller's thread sums up is little, too: to wake others for it takes longer
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
        _, sizes = cohort.rows.spans(cohort.places)
        order = np.lexsort((-sizes, -np.array(cohort.num_batches))).tolist()
        batches = CohortBatches(
            [cohort.clients[k] for k in order],
            cohort.rows,
            cohort.places[order],
            [cohort.num_batches[k] for k in order],
            batch_size=self._batch_size,
            seed=self._seed,
            round=round,
        )

        def run(span: range) -> _Sums:
            trainer, members = self._free.get(), order[span.start : span.stop]
            try:
                own = batches.chunk(span.start, span.stop)
                return self._train_chunk(trainer, cohort, members, own, start, round, result, memory)
            finally:
                self._free.put(trainer)

        chunks = _cut(len(order), self._chunk, self._num_workers)
        sums = self._run_all(run, chunks, on_chunk)
        for total, statistics in sums:  # not before all threads are done: each has a core by itself
            result.total.add_(total)
            for whole, part in zip(result.buffers.values(), statistics, strict=True):
                whole.add_(part)
        is_finite = math.isfinite(float(result.total.sum()))  # of a sum that is, all entries are
        if not is_finite and not bool(torch.isfinite(result.total).all()):
            raise TrainingError(_explain("the weights are", cohort, round))
        return result

    def _run_all(
        self,
        run: Callable[[range], _Sums],
        chunks: Sequence[range],
        on_chunk: Callable[[int], None],
    ) -> list[_Sums]:
        """Run all chunks, in this thread and the others; returns what they gave, in their order."""
        found: dict[int, _Sums] = {}
        pending = deque(enumerate(chunks))

        def next_chunk() -> tuple[int, range] | None:
            try:
                return pending.popleft()
            except IndexError:  # they are all done, or under way
                return None

        def run_some(tell: Callable[[int], None]) -> None:
            try:
                while (chunk := next_chunk()) is not None:
                    place, span = chunk
                    found[place] = run(span)
                    tell(sum(len(chunks[done]) for done in list(found)))
            except BaseException:
                pending.clear()
                raise

        others = [
            self._pool.submit(run_some, lambda _: None)
            for _ in range(min(self._num_workers, len(chunks)) - 1)
        ]
        run_some(on_chunk)
        for other in others:
            other.result()
        return [found[place] for place in range(len(chunks))]

    def _empty(
        self, cohort: Cohort, start: torch.Tensor, buffers: Mapping[str, torch.Tensor], keep: bool
    ) -> CohortResult:
        clients = len(cohort.clients)
        wide = torch.float64
        return CohortResult(
            figures=torch.zeros(4, clients, dtype=wide),
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
        batches: ChunkBatches,
        start: RoundStart,
        round: int,
        result: CohortResult,
        memory: Memory | None,
    ) -> _Sums:
        """Train some of the cohort; returns their weighted sums, in the memory of nobody."""
        module = trainer.module
        clients = [cohort.clients[k] for k in members]
        states = []
        if memory is not None and self._is_remembered:
            states = [memory.load(client) for client in clients]
        shares = torch.tensor([cohort.weights[k] for k in members], dtype=torch.float64)
        keep = result.parameters.shape[0] > 0
        trained = trainer.train(batches, shares, start, round=round, keep=keep, states=states)
        _check(trained.losses, clients, round)
        if memory is not None and self._is_remembered:
            num_steps = [-(-count // self._every) for count in batches.num_batches]
            kept = trainer.carried.end(num_steps, trained.figures[3], start)
            for client, state in zip(clients, kept, strict=True):
                memory.save(client, state)
        places = torch.tensor(members)
        result.figures[:, places] = trained.figures
        if keep:
            result.parameters[places] = module.parameters.rows(len(members))
        for name, own in result.own_buffers.items():
            own[places] = module.buffers[name][: len(members)]
        return trained.total.clone(), [buffer.clone() for buffer in trained.buffers]


def _cut(clients: int, most: int, workers: int) -> list[range]:
    """Chunks of equal size, of at most so many clients, as many for each worker."""
    count = -(-clients // most)
    count = min(-(-count // workers) * workers, clients)
    size = -(-clients // count)
    return [range(i, min(i + size, clients)) for i in range(0, clients, size)]


def _check(losses: torch.Tensor, clients: Sequence[str], round: int) -> None:
    """Every loss of every step, [S, K], is finite.

    Raises:
        TrainingError: one is not.
    """
    if math.isfinite(float(losses.sum())):
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
