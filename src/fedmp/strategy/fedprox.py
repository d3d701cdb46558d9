"""FedProx (Li et al., 2020, Federated Optimization in Heterogeneous Networks, algorithm 2).

Each client minimises its loss F_k with a pull towards the round's starting model x_t,

    h_k(w) = F_k(w) + mu/2 |w - x_t|^2        (equation 2),

so its steps follow grad F_k(w) + mu (w - x_t). Clients that do less work than others (`effort`) are averaged all
the same, instead of being dropped; they count by the samples that they have.

Where we differ: the server takes the mean weighted by samples of a uniform cohort, as the authors' code does, where
algorithm 2 samples by n_k and takes the plain mean (for that: selection=weighted strategy.weighting=uniform). A clipped
gradient is clipped before the pull is added. With mu = 0 and equal work it is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.rules import LocalRule

__all__ = ["FedProx", "Proximal"]


@dataclass(frozen=True)
class Proximal:
    """Adds the gradient of mu/2 |w - x_t|^2.

    Attributes:
        mu: strength of the pull.
    """

    mu: float
    received: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def correct(
        self,
        gradient: torch.Tensor,
        parameter: torch.Tensor,
        *,
        start: torch.Tensor,
        received: Mapping[str, torch.Tensor],
        kept: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """`gradient + mu (parameter - start)`."""
        return gradient.add(parameter - start, alpha=self.mu)

    def keep(
        self,
        change: torch.Tensor,
        *,
        received: Mapping[str, torch.Tensor],
        kept: Mapping[str, torch.Tensor],
        rate_sum: torch.Tensor | float,
    ) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}


class FedProx(FedAvg):
    """FedAvg whose clients are pulled back to the round's starting model.

    Args:
        mu: strength of the pull; the paper tries 0.001, 0.01, 0.1 and 1.
    """

    mu: float = Field(default=0.01, ge=0)
    weighting: Literal["processed", "samples", "uniform"] = "samples"

    @property
    def local_rule(self) -> LocalRule | None:
        """The pull; None if it has no strength."""
        return Proximal(self.mu) if self.mu else None
