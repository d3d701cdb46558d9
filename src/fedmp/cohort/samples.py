"""The samples of a chunk's batches, ready for the model.

Shape letters: K clients, S batches of the client with the most of them, B samples of the largest batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fedmp.cohort.batches import ChunkBatches
from fedmp.cohort.passes import Pass
from fedmp.pipeline import microbatch_sizes

if TYPE_CHECKING:
    from fedmp.cohort.chunk import ChunkWork

__all__ = ["Samples"]

_DRAWN_TARGETS = 1 << 16  # at once
_DRAWN_BYTES = 1 << 20  # of inputs at once


class Samples:
    """The samples of a chunk's batches, drawn for several batches at once where these are small.

    Threads wait for each other between operations, so a few large ones are faster than many small ones.

    Args:
        work: what the clients do.
        batches: of the round.
    """

    def __init__(self, work: ChunkWork, batches: ChunkBatches) -> None:
        self._work, self._batches = work, batches
        self._inputs, self._targets = range(0), range(0)  # batches that are drawn
        sample, (_, *shape) = batches.rows[0, :1, 0], batches.rows.shape
        self._num_targets = work.dataset.target_batch(sample).numel() * math.prod(shape)
        self._num_bytes = work.dataset.input_batch(sample).nbytes * math.prod(shape)

    def passes(self, batch: int) -> list[Pass]:
        """The passes through the model that one batch takes."""
        work, active = self._work, self._batches.num_active(batch)
        sizes = self._batches.sizes[batch]
        passes = []
        for first, stop in _runs(sizes, active, work.pads):
            for begin, width in _cuts(max(sizes[first:stop]), work.num_microbatches):
                span = slice(begin, begin + width)
                clients = slice(first, stop)
                inputs = self._inputs_of(batch, clients, span)
                passes.append(Pass(first, stop, inputs, *self._targets_of(batch, clients, span)))
        return passes

    def wholes(self, passes: Sequence[Pass], clients: int) -> torch.Tensor:
        """[K] weights of all that goes through these passes, by which losses are divided."""
        total = passes[0].weights
        if len(passes) > 1:
            total = torch.zeros(clients, dtype=torch.float64)
            for one in passes:
                total[one.first : one.stop] += one.weights
        return total

    def _inputs_of(self, batch: int, clients: slice, samples: slice) -> torch.Tensor:
        """[K, B, ...] inputs of some clients' samples of a batch."""
        if 2 * self._num_bytes > _DRAWN_BYTES:
            rows = self._batches.rows[batch, clients, samples]
            return _unflattened(self._work.dataset.input_batch(rows.reshape(-1)), rows.shape)
        if batch not in self._inputs:
            self._inputs = self._next(batch, _DRAWN_BYTES // self._num_bytes)
            rows = self._batches.rows[self._inputs.start : self._inputs.stop]
            drawn = self._work.dataset.input_batch(rows.reshape(-1))
            self._drawn_inputs = _unflattened(drawn, rows.shape)
        return self._drawn_inputs[batch - self._inputs.start, clients, samples].contiguous()

    def _targets_of(self, batch: int, clients: slice, samples: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """[K, B, ...] targets of some clients' samples of a batch, and their [K] weights."""
        if batch not in self._targets:
            self._draw_targets(batch)
        place = batch - self._targets.start
        targets = self._drawn_targets[place, clients, samples]
        if not self._work.pads:  # some of the samples only, perhaps
            return targets, self._work.objective.weights(targets)
        return targets, self._weights[place, clients]

    def _draw_targets(self, first: int) -> None:
        """Of the batches from this one on."""
        work = self._work
        self._targets = self._next(first, _DRAWN_TARGETS // self._num_targets)
        span = slice(self._targets.start, self._targets.stop)
        rows = self._batches.rows[span]
        targets = work.dataset.target_batch(rows.reshape(-1)).unflatten(0, (-1, rows.shape[2]))
        if work.pads:
            if self._batches.is_ragged:
                targets = work.objective.pad(targets, self._batches.lengths[span].view(-1))
            self._weights = work.objective.weights(targets).view(rows.shape[:2])
        self._drawn_targets = targets.unflatten(0, rows.shape[:2])

    def _next(self, first: int, count: int) -> range:
        return range(first, min(first + max(count, 1), len(self._batches.rows)))


def _unflattened(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return tensor.view(*shape, *tensor.shape[1:])


def _runs(sizes: Sequence[int], active: int, pads: bool) -> list[tuple[int, int]]:
    """Neighbouring clients that can run together: all, or those with equally large batches."""
    if pads:
        return [(0, active)]
    runs, first = [], 0
    for _, group in itertools.groupby(sizes[:active]):
        stop = first + len(list(group))
        runs.append((first, stop))
        first = stop
    return runs


def _cuts(size: int, num_microbatches: int) -> list[tuple[int, int]]:
    """Where each micro-batch begins, and how wide it is."""
    cuts, begin = [], 0
    for width in microbatch_sizes(size, num_microbatches):
        cuts.append((begin, width))
        begin += width
    return cuts
