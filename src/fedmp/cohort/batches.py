"""Which samples each client of a chunk trains on in which step: the batches of `LocalTrainer`, side by side.

Shape letters: K clients, S batches of the client with the most of them, B samples of the largest batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fedmp.seeds import derive_seed

__all__ = ["ChunkBatches", "draw_batches"]


@dataclass(frozen=True, eq=False)
class ChunkBatches:
    """A round's batches of several clients, those with the most batches first.

    Attributes:
        rows: [S, K, B] rows of the data set. Where a batch is shorter, its first row is repeated, so that
            whatever is computed of padding is finite; where a client has no batch any more, some row.
        sizes: [S][K] samples of each batch; 0 where there is none.
        num_batches: of each client.
    """

    rows: torch.Tensor
    sizes: tuple[tuple[int, ...], ...]
    num_batches: tuple[int, ...]

    def num_active(self, batch: int) -> int:
        """Clients that have such a batch: the first so many."""
        sizes = self.sizes[batch]
        return len(sizes) - sizes.count(0)


def draw_batches(
    clients: Sequence[str],
    rows: Sequence[torch.Tensor],
    num_batches: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    round: int,
) -> ChunkBatches:
    """The batches that each client would draw alone.

    Args:
        clients: names, which seed the order.
        rows: each client's rows of the data set.
        num_batches: of each client, descending.
        batch_size: samples in one.
        seed, round: seed the order as well.
    """
    counts = tuple(own.shape[0] for own in rows)
    layout = _layout(counts, tuple(num_batches), batch_size)
    generator = torch.Generator()
    orders = []
    for client, samples, epochs in zip(clients, counts, layout.epochs, strict=True):
        for epoch in range(epochs):
            generator.manual_seed(derive_seed(seed, "batches", client, round, epoch))
            orders.append(torch.randperm(samples, generator=generator))
    # each pass's order, moved to where the client's rows begin among all of them
    shuffled = torch.cat(orders).add_(layout.shifts)
    drawn = torch.cat(list(rows))[shuffled[layout.places]]
    return ChunkBatches(drawn, layout.sizes, tuple(num_batches))


@dataclass(frozen=True, eq=False)
class _Layout:
    """What does not depend on the order: epochs of each client, and which of its drawn samples goes where."""

    epochs: tuple[int, ...]
    shifts: torch.Tensor
    places: torch.Tensor
    sizes: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=64)  # clients of equal sizes come round after round
def _layout(counts: tuple[int, ...], num_batches: tuple[int, ...], batch_size: int) -> _Layout:
    per_epoch = [-(-count // batch_size) for count in counts]
    epochs = tuple(-(-wanted // own) for wanted, own in zip(num_batches, per_epoch, strict=True))
    first_rows = [0]
    for count in counts:
        first_rows.append(first_rows[-1] + count)
    passes = torch.tensor([count for count, many in zip(counts, epochs, strict=True) for _ in range(many)])
    offsets = torch.tensor([row for row, many in zip(first_rows, epochs, strict=False) for _ in range(many)])
    batch = torch.arange(num_batches[0]).unsqueeze(1)
    own, held = torch.tensor(per_epoch), torch.tensor(counts)
    epoch, within = batch // own, batch % own
    sizes = (held - within * batch_size).clamp(max=batch_size)
    sizes = torch.where(batch < torch.tensor(num_batches), sizes, 0)
    drawn_before = torch.tensor([0, *(c * e for c, e in zip(counts, epochs, strict=True))]).cumsum(0)[:-1]
    start = drawn_before + epoch * held + within * batch_size
    start = torch.where(sizes > 0, start, drawn_before)
    column = torch.arange(int(sizes.max()))
    places = start.unsqueeze(2) + torch.where(column < sizes.unsqueeze(2), column, 0)
    return _Layout(epochs, offsets.repeat_interleave(passes), places, tuple(map(tuple, sizes.tolist())))
