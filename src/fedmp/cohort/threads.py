"""How many threads torch's operations use."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["forward_flops", "is_small", "one_thread"]

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


def forward_flops(model: torch.nn.Module, inputs: torch.Tensor) -> int:
    """Operations of a model's products on the way forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval()(inputs)
    return int(counter.get_total_flops())


def is_small(model: torch.nn.Module, inputs: torch.Tensor) -> bool:
    """Whether threads that share each operation of a step would wait longer than they work."""
    return forward_flops(model, inputs) < _SMALL_FLOPS
