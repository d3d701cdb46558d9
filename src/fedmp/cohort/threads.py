"""How many threads torch's operations use."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["is_small", "one_thread"]

_SMALL_FLOPS = 5e7  # of a forward


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
    """Whether threads that share each operation would wait longer than they work."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval()(inputs)
    return bool(counter.get_total_flops() < _SMALL_FLOPS)
