"""FedNova (Wang et al., 2020, Tackling the Objective Inconsistency Problem, equations 5 to 8).

A client that makes more steps moves further, so FedAvg minimises an objective in which it counts for more than its
samples. FedNova averages directions and scales the mean once:

    x' = x - tau_eff sum_i p_i eta d_i,      d_i = G_i a_i / |a_i|_1,      tau_eff = sum_i p_i |a_i|_1,

with G_i the client's gradients, a_i the coefficients with which they went into its change, and p_i its share of the
samples. In our terms, with R_i = eta |a_i|_1 the sum of these coefficients and learning rates,

    update = (sum_i p_i R_i) * sum_i p_i (y_i - x) / R_i.

For SGD with momentum rho, |a_i|_1 = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho), which clients sum up as they go
along, so that learning rates may change on the way. When all make the same number of steps it is FedAvg. Buffers are
averaged as they are. The momentum at the server that the authors' code has is the server optimizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.rules import Scaled, ServerRound, ServerRule, Slots

__all__ = ["FedNova", "NormalisedMean"]


@dataclass(frozen=True)
class NormalisedMean:
    """The mean of the updates per unit of step, times the mean step."""

    slots: tuple[str, ...] = ()

    def step(self, round: ServerRound) -> tuple[dict[str, torch.Tensor], Slots]:
        """`sum(p_i R_i) * combine(update_i / R_i)`."""
        updates, weights = round.updates, round.weights
        total = sum(weights)
        mean_rate = sum(w / total * update.rate_sum for w, update in zip(weights, updates, strict=True))
        direction = round.combine(
            [Scaled(update, 1.0 / update.rate_sum, round.parameters) for update in updates], weights
        )
        return dict(Scaled(direction, mean_rate, round.parameters)), round.slots


class FedNova(FedAvg):
    """FedAvg that takes the number of local steps out of an update's weight."""

    weighting: Literal["processed", "samples", "uniform"] = "samples"

    @property
    def server_rule(self) -> ServerRule | None:
        """The normalised mean."""
        return NormalisedMean()
