"""Which samples each client of a chunk trains on in which step: the batches of `LocalTrainer`, side by side.

Shape letters: K clients, S batches of the client with the most of them, B samples of the largest batch.
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

__all__ = ["ChunkBatches", "draw_batches"]

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


def draw_batches(
    clients: Sequence[str],
    rows: Rows,
    places: Integers,
    num_batches: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    round: int,
) -> ChunkBatches:
    """The batches that each client would draw alone.

    Args:
        clients: names, which seed the order.
        rows: everybody's rows of the data set.
        places: [K] of the clients among those.
        num_batches: of each client, descending.
        batch_size: samples in one.
        seed, round: seed the order as well.
    """
    starts, counts = rows.spans(places)
    layout = _layout(tuple(counts.tolist()), tuple(num_batches), batch_size)
    streams = client_streams(clients, seed=seed, round=round)
    order = np.empty(layout.num_drawn, dtype=np.int64)
    for group in layout.groups:
        order[group.slots] = passes(streams[group.clients], group.epochs, group.slots.shape[1])
    drawn = rows.flat.numpy()[order[layout.slots] + starts[:, None]]
    return ChunkBatches(torch.from_numpy(drawn), layout.lengths, layout.sizes, layout.num_batches)


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
class _Layout:
    """What does not depend on the order.

    Attributes:
        groups: all passes.
        num_drawn: samples of all of them.
        slots: [S, K, B] which drawn sample goes where.
        lengths, sizes, num_batches: of the batches.
    """

    groups: tuple[_Passes, ...]
    num_drawn: int
    slots: Integers
    lengths: torch.Tensor
    sizes: tuple[tuple[int, ...], ...]
    num_batches: tuple[int, ...]


@lru_cache(maxsize=64)  # clients of equal sizes come round after round
def _layout(counts: tuple[int, ...], num_batches: tuple[int, ...], batch_size: int) -> _Layout:
    held, wanted = np.array(counts), np.array(num_batches)
    per_epoch = -(-held // batch_size)
    epochs = -(-wanted // per_epoch)
    drawn = held * epochs
    first = drawn.cumsum() - drawn  # of each client's samples among all that are drawn
    batch = np.arange(num_batches[0])[:, None]
    epoch, within = np.divmod(batch, per_epoch)
    sizes = np.where(batch < wanted, (held - within * batch_size).clip(max=batch_size), 0)
    start = np.where(sizes > 0, first + epoch * held + within * batch_size, first)
    column = np.arange(sizes.max())
    slots = start[:, :, None] + np.where(column < sizes[:, :, None], column, 0)
    groups = []
    for count in dict.fromkeys(counts):
        members = np.flatnonzero(held == count)
        owners = members.repeat(epochs[members])
        numbers = np.concatenate([np.arange(many) for many in epochs[members]])
        begin = first[owners] + numbers * count
        groups.append(_Passes(owners, numbers, begin[:, None] + np.arange(count)))
    lengths = torch.from_numpy(sizes)
    return _Layout(
        tuple(groups), int(drawn.sum()), slots, lengths, tuple(map(tuple, sizes.tolist())), num_batches
    )
