"""Where the gradient of a stacked parameter goes as a backward finds it: into memory, or as a step into the weights.

Plain SGD needs no gradient but for one subtraction. So its steps are made within the backward, by the very product
that gives the gradient, which saves writing and reading as much memory as all clients' weights take, twice. Where only
the sum of the clients' weights is wanted, more can be saved: before the first step all have the same weights, so one
matrix product does for all of them; and the last step is one product for the sum instead of one for each client.

Shape letters: K clients, N rows, I and O features in and out.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

__all__ = ["Arrived", "Slot", "Step"]


class Step(NamedTuple):
    """How gradients are taken in during a step.

    Attributes:
        rate: the learning rate with which they move the weights at once; 0 if they are collected.
        is_first: of a round whose sum is wanted: all clients have the weights that they were handed out.
        is_last: of such a round.
    """

    rate: float = 0.0
    is_first: bool = False
    is_last: bool = False


class Arrived(Enum):
    """What has become of a step's gradient so far."""

    NOTHING = "nothing"
    GRADIENT = "gradient"
    STEP = "step"
    SUM = "sum"


class Slot:
    """Where the gradient of a parameter of some neighbouring clients goes.

    Args:
        gradient, weight: [K, ...] as views of the chunk's.
        start: [...] what the clients were handed out.
        total: [...] for the clients' last gradients times their shares, summed.
        shares: [K] of the clients.

    Attributes:
        arrived: what has become of this step's gradient.
        num_uses: functions that took the parameter in this pass.
    """

    __slots__ = ("arrived", "gradient", "num_uses", "shares", "start", "step", "total", "weight")

    def __init__(
        self,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        start: torch.Tensor,
        total: torch.Tensor,
        shares: torch.Tensor,
    ) -> None:
        self.gradient, self.weight, self.start, self.total = gradient, weight, start, total
        self.shares = shares
        self.begin(Step(), Arrived.NOTHING)

    def begin(self, step: Step, arrived: Arrived) -> None:
        """Get ready for a step's gradients."""
        self.step, self.arrived, self.num_uses = step, arrived, 0

    @property
    def common(self) -> torch.Tensor | None:
        """[...] the weights of all clients, where these are still the same; else None."""
        return self.start if self.step.is_first else None

    def add(self, gradient: torch.Tensor, *, is_over: bool = False) -> None:
        """Take a gradient, [K, ...].

        Args:
            gradient: of these clients.
            is_over: whether the backward is, so that nobody reads the weights any more.
        """
        if self._is_used_once or (is_over and self.step.rate and self.arrived is not Arrived.GRADIENT):
            self.weight.add_(gradient, alpha=-self.step.rate)
            if self.arrived is Arrived.NOTHING:
                self.arrived = Arrived.STEP
        elif self.arrived is Arrived.GRADIENT:
            self.gradient.add_(gradient)
        else:
            self.gradient.copy_(gradient)
            self.arrived = Arrived.GRADIENT

    def add_product(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Take the clients' matrix products [K, N, O] transposed by [K, N, I], without a tensor between."""
        if self._is_used_once:
            if self.step.is_last:
                shared = (first * self.shares.view(-1, 1, 1)).flatten(0, 1)
                torch.mm(shared.t(), second.flatten(0, 1), out=self.total)
                self.arrived = Arrived.SUM
                return
            self.weight.baddbmm_(first.transpose(1, 2), second, alpha=-self.step.rate)
            self.arrived = Arrived.STEP
        elif self.arrived is Arrived.GRADIENT:
            self.gradient.baddbmm_(first.transpose(1, 2), second)
        else:
            torch.bmm(first.transpose(1, 2), second, out=self.gradient)
            self.arrived = Arrived.GRADIENT

    def add_rows(self, rows: torch.Tensor) -> None:
        """Take the clients' sums over dim 1 of [K, N, O]."""
        if self._is_used_once:
            self.weight.add_(rows.sum(1), alpha=-self.step.rate)
            self.arrived = Arrived.STEP
        elif self.arrived is Arrived.GRADIENT:
            self.gradient.add_(rows.sum(1))
        else:
            torch.sum(rows, 1, out=self.gradient)
            self.arrived = Arrived.GRADIENT

    @property
    def _is_used_once(self) -> bool:
        """Whether the weights may move now, in the middle of a backward: nobody else reads what they were."""
        return bool(self.step.rate) and self.num_uses == 1 and self.arrived is Arrived.NOTHING
