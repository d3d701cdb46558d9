"""How the learning rate changes over a run, as a factor on the optimizer's own; what the rates of a round sum to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from pydantic import Field

from fedmp.component import Component

__all__ = ["Constant", "Cosine", "LearningRate", "RateSum"]


@runtime_checkable
class LearningRate(Protocol):
    """A schedule of the learning rate."""

    def factor(self, progress: float) -> float:
        """What to multiply the optimizer's learning rate by.

        Args:
            progress: from 0 at the first step of the run to nearly 1 at the last.
        """
        ...


class Constant(Component):
    """The optimizer's own rate throughout."""

    def factor(self, progress: float) -> float:
        """1."""
        return 1.0


class Cosine(Component):
    """Half a cosine wave down to nothing (Loshchilov and Hutter, 2017, SGDR, equation 5, without restarts).

    Args:
        floor: the factor at the end.
    """

    floor: float = Field(default=0.0, ge=0, le=1)

    def factor(self, progress: float) -> float:
        """From 1 to `floor`."""
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


class RateSum:
    """The sum of the coefficients with which a round's gradients go into its change.

    For SGD with momentum rho (Wang et al., 2020, appendix C.1, here for rates that may change): after step k the
    buffer holds the gradients with coefficients that sum to b_k = rho b_{k-1} + 1 - dampening, and the step adds
    eta_k b_k, or eta_k (1 + rho b_k) with Nesterov's. Optimizers that normalise gradients count each step's rate.

    Args:
        group: settings of the optimizer, whose momentum begins with the round.

    Attributes:
        total: so far.
    """

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._momentum = float(group.get("momentum", 0.0))
        self._dampening = float(group.get("dampening", 0.0))
        self._nesterov = bool(group.get("nesterov", False))
        self._buffer = 0.0
        self.total = 0.0

    def weight(self) -> float:
        """A step is made: what its rate counts, eta_k's coefficient."""
        fresh = 1.0 if self._buffer == 0.0 else 1.0 - self._dampening
        self._buffer = self._momentum * self._buffer + fresh if self._momentum else 1.0
        return 1.0 + self._momentum * self._buffer if self._nesterov else self._buffer

    def add(self, rate: float) -> None:
        """A step was made at this rate."""
        self.total += float(rate) * self.weight()
