"""Which samples each client of a cohort trains on in which step: the batches of `LocalTrainer`, side by side.

Shape letters: K clients, S batches of the client with the most of them, B samples of the largest batch, D samples
that are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from fedmp.data import Rows
from fedmp.data.order import client_streams, passes

__all__ = ["ChunkBatches", "CohortBatches"]

_DRAWN_AT_ONCE = 1 << 16  # samples

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ChunkBatches:
    """A round's batches of several clients, those with the most batches first.

    Attributes:
        rows: [S, K, B] rows of the data set. Where a batch is shorter, its first row is repeated, so that
            whatever is computed of padding is finite; where a client has no batch any more, some row.
        sizes: [S][K] samples of each batch; 0 where there is none.
        lengths: the same as a tensor, [S, K].
        num_batches: of each client.
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    sizes: tuple[tuple[int, ...], ...]
    num_batches: tuple[int, ...]

    @property
    def is_ragged(self) -> bool:
        """Whether any batch of a client is shorter than `rows` has room for."""
        wide = self.rows.shape[2]
        return any(size != wide for sizes in self.sizes for size in sizes)

    def num_active(self, batch: int) -> int:
        """Clients that have such a batch: the first so many."""
        sizes = self.sizes[batch]
        return len(sizes) - sizes.count(0)


class CohortBatches:
    """The batches that each client of a cohort would draw alone, chunk by chunk.

    Args:
        clients: names, which seed the order.
        rows: everybody's rows of the data set.
        places: [K] of the clients among those.
        num_batches: of each client in this round, descending.
        batch_size: samples in one.
        seed, round: seed the order as well.
    """

    def __init__(
        self,
        clients: Sequence[str],
        rows: Rows,
        places: Integers,
        num_batches: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        round: int,
    ) -> None:
        self._clients, self._flat, self._num_batches = clients, rows.flat.numpy(), num_batches
        self._batch_size, self._seed, self._round = batch_size, seed, round
        self._starts, self._counts = rows.spans(places)
        epochs = _num_epochs(self._counts, np.array(num_batches), batch_size)
        self._ends = [0, *(self._counts * epochs).cumsum().tolist()]
        # a small cohort's all at once; of a large one, chunks draw theirs side by side
        is_small = self._ends[-1] <= _DRAWN_AT_ONCE
        self._drawn = self._draw(0, len(clients)) if is_small else None

    def chunk(self, first: int, stop: int) -> ChunkBatches:
        """Those of some neighbouring clients."""
        if self._drawn is None:
            drawn = self._draw(first, stop)
        else:
            drawn = self._drawn[self._ends[first] : self._ends[stop]]
        layout = _layout(*self._key(first, stop))
        batches = torch.from_numpy(drawn[layout.slots])
        return ChunkBatches(batches, layout.lengths, layout.sizes, layout.num_batches)

    def _draw(self, first: int, stop: int) -> Integers:
        """The rows of these clients in the order of their passes, client after client."""
        passing = _passing(*self._key(first, stop))
        streams = client_streams(self._clients[first:stop], seed=self._seed, round=self._round)
        order = np.empty(len(passing.owners), dtype=np.int64)
        for group in passing.groups:
            order[group.slots] = passes(streams[group.clients], group.epochs, group.slots.shape[1])
        found: Integers = self._flat[order + self._starts[first:stop][passing.owners]]
        return found

    def _key(self, first: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        counts = tuple(self._counts[first:stop].tolist())
        return counts, tuple(self._num_batches[first:stop]), self._batch_size


@dataclass(frozen=True, eq=False)
class _Passes:
    """Passes of clients that have equally many samples.

    Attributes:
        clients, epochs: [N] whose each one is, and which of the client's.
        slots: [N, n] where its order goes.
    """

    clients: Integers
    epochs: Integers
    slots: Integers


@dataclass(frozen=True, eq=False)
class _Passing:
    """What clients draw, whatever the order.

    Attributes:
        groups: all passes.
        owners: [D] whose each sample is that is drawn.
    """

    groups: tuple[_Passes, ...]
    owners: Integers


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where drawn samples go, whatever the order.

    Attributes:
        slots: [S, K, B] which drawn sample goes where.
        lengths, sizes, num_batches: of the batches.
    """

    slots: Integers
    lengths: torch.Tensor
    sizes: tuple[tuple[int, ...], ...]
    num_batches: tuple[int, ...]


def _num_epochs(held: Integers, num_batches: Integers, batch_size: int) -> Integers:
    """[K] passes that so many batches take, the last of which need not be complete."""
    return -(-num_batches // -(-held // batch_size))


@lru_cache(maxsize=64)  # clients of equal sizes come round after round
def _passing(counts: tuple[int, ...], num_batches: tuple[int, ...], batch_size: int) -> _Passing:
    held = np.array(counts)
    epochs = _num_epochs(held, np.array(num_batches), batch_size)
    drawn = held * epochs
    first = drawn.cumsum() - drawn
    groups = []
    for count in dict.fromkeys(counts):
        members = np.flatnonzero(held == count)
        owners = members.repeat(epochs[members])
        numbers = np.concatenate([np.arange(many) for many in epochs[members]])
        begin = first[owners] + numbers * count
        groups.append(_Passes(owners, numbers, begin[:, None] + np.arange(count)))
    return _Passing(tuple(groups), np.arange(len(counts)).repeat(drawn))


@lru_cache(maxsize=64)
def _layout(counts: tuple[int, ...], num_batches: tuple[int, ...], batch_size: int) -> _Layout:
    held, wanted = np.array(counts), np.array(num_batches)
    per_epoch = -(-held // batch_size)
    drawn = held * _num_epochs(held, wanted, batch_size)
    first = drawn.cumsum() - drawn  # of each client's samples among all that are drawn
    batch = np.arange(num_batches[0])[:, None]
    epoch, within = np.divmod(batch, per_epoch)
    sizes = np.where(batch < wanted, (held - within * batch_size).clip(max=batch_size), 0)
    start = np.where(sizes > 0, first + epoch * held + within * batch_size, first)
    column = np.arange(sizes.max())
    slots = start[:, :, None] + np.where(column < sizes[:, :, None], column, 0)
    return _Layout(slots, torch.from_numpy(sizes), tuple(map(tuple, sizes.tolist())), num_batches)
