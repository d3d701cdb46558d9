"""FedDyn (Acar et al., 2021, Federated Learning Based on Dynamic Regularization, algorithm 1).

Client k minimises, from the server's x_{t-1},

    L_k(w) - <g_k, w> + alpha/2 |w - x_{t-1}|^2,

so its steps follow grad L_k(w) - g_k + alpha (w - x_{t-1}), and keeps g_k' = g_k - alpha (y_k - x_{t-1}), which in the
minimum is grad L_k(y_k). The server keeps h and sets, over the cohort P of m clients,

    h_t = h_{t-1} - alpha/m sum_{k in P} (y_k - x_{t-1}),      x_t = mean_{k in P} y_k - h_t / alpha.

In the limit the clients' minima are those of the whole, however unlike their data are. Where we differ: both means are
the job's aggregator's; clients make the local steps that the job says instead of finding the minimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.rules import LocalRule, ServerRound, ServerRule, Slots

__all__ = ["DynamicCorrection", "DynamicRegularizer", "FedDyn"]

_GRADIENT = "gradient"
_DRIFT = "drift"


@dataclass(frozen=True)
class DynamicRegularizer:
    """The client's side: keeps `g_k` in the slot "gradient".

    Attributes:
        alpha: strength of the regulariser.
    """

    alpha: float
    received: tuple[str, ...] = ()
    kept: tuple[str, ...] = (_GRADIENT,)

    def correct(
        self,
        gradient: torch.Tensor,
        parameter: torch.Tensor,
        *,
        start: torch.Tensor,
        received: Mapping[str, torch.Tensor],
        kept: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """`gradient - g_k + alpha (parameter - start)`."""
        return (gradient - kept[_GRADIENT]).add(parameter - start, alpha=self.alpha)

    def keep(
        self,
        change: torch.Tensor,
        *,
        received: Mapping[str, torch.Tensor],
        kept: Mapping[str, torch.Tensor],
        rate_sum: torch.Tensor | float,
    ) -> dict[str, torch.Tensor]:
        """`g_k - alpha change`."""
        return {_GRADIENT: kept[_GRADIENT].sub(change, alpha=self.alpha)}


@dataclass(frozen=True)
class DynamicCorrection:
    """The server's side: keeps `h` in the slot "drift".

    Attributes:
        alpha: as the clients'.
    """

    alpha: float
    slots: tuple[str, ...] = (_DRIFT,)

    def step(self, round: ServerRound) -> tuple[dict[str, torch.Tensor], Slots]:
        """`mean - h' / alpha`, and `h' = h - alpha |P|/m mean`."""
        update = round.combined()
        drift = {
            name: h.sub(update[name], alpha=self.alpha * round.share) if name in update else h
            for name, h in round.slots[_DRIFT].items()
        }
        for name, h in drift.items():
            if name in update:
                update[name] = update[name].sub(h, alpha=1.0 / self.alpha)
        return update, {_DRIFT: drift}


class FedDyn(FedAvg):
    """FedAvg with a regulariser that each client and the server learn.

    Args:
        alpha: its strength; the paper uses 0.001 to 0.1.
    """

    needs_present_model: ClassVar[str] = (
        "what the server learns of the clients' drift must be what they learn, of whole updates"
    )

    alpha: float = Field(default=0.1, gt=0)
    weighting: Literal["processed", "samples", "uniform"] = "uniform"

    @property
    def local_rule(self) -> LocalRule | None:
        """The regulariser."""
        return DynamicRegularizer(self.alpha)

    @property
    def server_rule(self) -> ServerRule | None:
        """What the server learns of the clients' drift."""
        return DynamicCorrection(self.alpha)
