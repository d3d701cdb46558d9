"""SCAFFOLD (Karimireddy et al., 2020, Stochastic Controlled Averaging for Federated Learning, algorithm 1).

Control variates estimate where each client drifts to, c_i, and where all of them together go, c. A client's steps
follow grad F_i(y) - c_i + c, and in the end, by option II,

    c_i' = c_i - c + (x - y_i) / R_i,      R_i = sum of the steps' learning rates (K eta_l of the paper);

the server then sets, over the cohort S of N clients,

    x' = x + eta_g/|S| sum_{i in S} (y_i - x),      c' = c + 1/N sum_{i in S} (c_i' - c_i).

Where we differ: the paper's clients send c_i' - c_i beside y_i - x. By option II it is -c - (y_i - x) / R_i, so the
server computes the sum from the updates and one number a client, and an update is as large as FedAvg's:

    c' = c - |S|/N (c + mean_{i in S} (y_i - x) / R_i).

With momentum, R_i is the sum of the coefficients of all gradients in y_i - x, so that (x - y_i) / R_i is still their
weighted mean. Both means are the job's aggregator's. The server's step eta_g is the server optimizer's rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.rules import LocalRule, Scaled, ServerRound, ServerRule, Slots

__all__ = ["ControlVariates", "MeanControl", "Scaffold"]

_CONTROL = "control"


@dataclass(frozen=True)
class ControlVariates:
    """The client's side: `c` is received, `c_i` is kept, both in the slot "control"."""

    received: tuple[str, ...] = (_CONTROL,)
    kept: tuple[str, ...] = (_CONTROL,)

    def correct(
        self,
        gradient: torch.Tensor,
        parameter: torch.Tensor,
        *,
        start: torch.Tensor,
        received: Mapping[str, torch.Tensor],
        kept: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """`gradient - c_i + c`."""
        return gradient - kept[_CONTROL] + received[_CONTROL]

    def keep(
        self,
        change: torch.Tensor,
        *,
        received: Mapping[str, torch.Tensor],
        kept: Mapping[str, torch.Tensor],
        rate_sum: torch.Tensor | float,
    ) -> dict[str, torch.Tensor]:
        """`c_i - c - change / R_i`."""
        return {_CONTROL: kept[_CONTROL] - received[_CONTROL] - change / rate_sum}


@dataclass(frozen=True)
class MeanControl:
    """The server's side: moves `c` by the cohort's share of its clients' changes."""

    slots: tuple[str, ...] = (_CONTROL,)

    def step(self, round: ServerRound) -> tuple[dict[str, torch.Tensor], Slots]:
        """The mean update, and `c - |S|/N (c + mean(update / R_i))`."""
        control, share = round.slots[_CONTROL], round.share
        drifts = [Scaled(update, 1.0 / update.rate_sum, round.parameters) for update in round.updates]
        drift = round.combine(drifts, [1.0] * len(drifts))
        moved = {
            name: (c - share * (c + drift[name])).to(c.dtype) if name in drift else c
            for name, c in control.items()
        }
        return round.combined(), {_CONTROL: moved}


class Scaffold(FedAvg):
    """FedAvg whose clients take their drift out of their gradients."""

    needs_present_model: ClassVar[str] = (
        "the server's control variate is the mean of the clients' only if all begin with the same one"
    )

    weighting: Literal["processed", "samples", "uniform"] = "uniform"

    @property
    def local_rule(self) -> LocalRule | None:
        """The correction by control variates."""
        return ControlVariates()

    @property
    def server_rule(self) -> ServerRule | None:
        """The move of the server's control variate."""
        return MeanControl()
