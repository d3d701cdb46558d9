"""A batch cut into micro-batches, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["BatchResult", "MicroBatches", "microbatch_sizes"]


def microbatch_sizes(batch_size: int, num_microbatches: int) -> list[int]:
    """Cut a batch into micro-batches as equal as possible, none of them empty.

    Args:
        batch_size: samples; at least 1.
        num_microbatches: wanted; a batch with fewer samples gets one a sample.

    Returns:
        The samples of each micro-batch, larger ones first.

    Example:
        >>> microbatch_sizes(7, 3)
        [3, 2, 2]
    """
    count = min(batch_size, num_microbatches)
    return [batch_size // count + (index < batch_size % count) for index in range(count)]


@dataclass(frozen=True)
class MicroBatches:
    """One batch, cut up.

    Attributes:
        sizes: samples of each micro-batch; known to every stage.
        inputs: tensors of each micro-batch; only the first stage has them.
        targets: of each micro-batch, a tensor or whatever else the task takes; only the last stage has them.
    """

    sizes: Sequence[int]
    inputs: Sequence[Sequence[torch.Tensor]] | None = None
    targets: Sequence[Any] | None = None


@dataclass(frozen=True)
class BatchResult:
    """What the last stage knows after a batch; zeros on the other stages.

    Attributes:
        loss_sum: loss summed over its terms.
        weight: number of terms.
        num_correct: terms predicted correctly.
    """

    loss_sum: float = 0.0
    weight: float = 0.0
    num_correct: float = 0.0

    def __add__(self, other: BatchResult) -> BatchResult:
        return BatchResult(
            self.loss_sum + other.loss_sum, self.weight + other.weight, self.num_correct + other.num_correct
        )
