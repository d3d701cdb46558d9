"""How the learning rate changes over a run: a factor on the optimizer's own rate, by progress."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

from pydantic import Field

from fedmp.component import Component

__all__ = ["Constant", "Cosine", "LearningRate"]


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
