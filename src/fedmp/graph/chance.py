"""Decide, while tracing, branches on a random number whose outcome is certain.

Layer drop is written `if torch.rand([]) < self.layerdrop: skip`. With a probability of 0 the branch is
never taken, but a trace does not know that: the number has no value yet.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fedmp.errors import TraceError

__all__ = ["DecideCertainBranches"]

_COMPARISONS: dict[Any, Callable[[float, float], bool]] = {
    torch.Tensor.lt: operator.lt,
    torch.Tensor.__lt__: operator.lt,
    torch.Tensor.le: operator.le,
    torch.Tensor.__le__: operator.le,
    torch.Tensor.gt: operator.gt,
    torch.Tensor.__gt__: operator.gt,
    torch.Tensor.ge: operator.ge,
    torch.Tensor.__ge__: operator.ge,
    torch.lt: operator.lt,
    torch.le: operator.le,
    torch.gt: operator.gt,
    torch.ge: operator.ge,
}
_ALMOST_ONE = 1 - 2**-24


class DecideCertainBranches(TorchFunctionMode):
    """Knows that `torch.rand` is at least 0 and less than 1.

    Raises:
        TraceError: a branch depends on a random number that may fall either way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uniform: list[torch.Tensor] = []
        self._decided: list[tuple[torch.Tensor, bool | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.__bool__, torch.Tensor.item):
            for tensor, outcome in self._decided:
                if tensor is args[0]:
                    if outcome is not None:
                        return outcome
                    raise TraceError(
                        "a branch depends on a random number (torch.rand), so each step would run another "
                        "graph; set the probability to 0 (layerdrop and its like), or make the module that "
                        "branches a leaf: leaves=('its.name',)"
                    )
        result = func(*args, **(kwargs or {}))
        if func is torch.rand and isinstance(result, torch.Tensor) and result.dim() == 0:
            self._uniform.append(result)
        compare = _COMPARISONS.get(func)
        if compare is not None and any(tensor is args[0] for tensor in self._uniform):
            limit = args[1]
            if isinstance(limit, int | float):
                outcomes = {compare(0.0, limit), compare(_ALMOST_ONE, limit)}
                self._decided.append((result, outcomes.pop() if len(outcomes) == 1 else None))
        return result
