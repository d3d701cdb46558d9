"""How many threads torch's operations use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedmp.graph import forward_flops

__all__ = ["is_small", "one_thread"]

_SMALL_FLOPS = 1e8  # of a forward


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's operations in this thread use no other thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_small(model: torch.nn.Module, inputs: torch.Tensor) -> bool:
    """Whether threads that share each operation of a step would wait longer than they work."""
    return forward_flops(model, inputs) < _SMALL_FLOPS
