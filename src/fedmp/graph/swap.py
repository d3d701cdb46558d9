"""Run a module with other tensors in the place of its parameters and buffers.

`torch.func.functional_call` (torch 2.13) leaves the other tensors behind in a module that is registered
under two names, so it is not used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from fedmp.graph.specs import named_tensors

__all__ = ["swapped"]


@contextlib.contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put tensors into a module for a while.

    Args:
        module: left as it was.
        tensors: by the name of a parameter or buffer; tied names follow the one that is given. A buffer
            that the module assigns anew has its value copied into the tensor given for it.
    """
    own = named_tensors(module)
    other = {id(own[name]): tensor for name, tensor in tensors.items()}
    slots = [
        (place, key, value)
        for part in module.modules()
        for place in (part._parameters, part._buffers)
        for key, value in place.items()
        if id(value) in other
    ]
    for place, key, value in slots:
        place[key] = other[id(value)]  # type: ignore[assignment]
    try:
        yield
        for place, key, value in slots:
            given, now = other[id(value)], place.get(key)
            if isinstance(now, torch.Tensor) and now is not given and now.shape == given.shape:
                with torch.no_grad():
                    given.copy_(now)
    finally:
        for place, key, value in slots:
            place[key] = value  # type: ignore[assignment]
