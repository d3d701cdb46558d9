"""FedNova (Wang et al., 2020, Tackling the Objective Inconsistency Problem, equations 5 to 8).

A client that makes more steps moves further, so FedAvg minimises an objective in which it counts for more than its
samples. FedNova averages directions and scales the mean once:

    x' = x - tau_eff sum_i p_i eta d_i,      d_i = G_i a_i / |a_i|_1,      tau_eff = sum_i p_i |a_i|_1,

with G_i the client's gradients, a_i the coefficients with which they went into its change, and p_i its share of the
samples. In our terms, with R_i = eta |a_i|_1 the sum of these coefficients and learning rates,

    update = (sum_i p_i R_i) * sum_i p_i (y_i - x) / R_i.

For SGD with momentum rho, |a_i|_1 = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho), which clients sum up as they go
along, so that learning rates may change on the way. When all make the same number of steps it is FedAvg. Buffers are
averaged as they are.

With `mu`, clients are pulled back to x as in FedProx (section 4 of the paper, table 1). A step then shrinks the
change so far by 1 - eta mu, so |a_i|_1 = (1 - (1 - eta mu)^tau) / (eta mu), with eta = R_i / tau the client's mean
rate: exact for SGD without momentum at one rate in a round.

The momentum at the server that the authors' code has is the server optimizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.fedprox import Proximal
from fedmp.strategy.rules import Contribution, LocalRule, Scaled, ServerRound, ServerRule, Slots

__all__ = ["FedNova", "NormalisedMean"]


@dataclass(frozen=True)
class NormalisedMean:
    """The mean of the updates per unit of step, times the mean step.

    Attributes:
        mu: strength of the pull that the clients' steps had.
    """

    mu: float = 0.0
    slots: tuple[str, ...] = ()

    def step(self, round: ServerRound) -> tuple[dict[str, torch.Tensor], Slots]:
        """`sum(p_i R_i) * combine(update_i / R_i)`."""
        updates, weights = round.updates, round.weights
        total = sum(weights)
        rates = [self._rate_sum(update) for update in updates]
        mean_rate = sum(w / total * rate for w, rate in zip(weights, rates, strict=True))
        direction = round.combine(
            [Scaled(u, 1.0 / rate, round.parameters) for u, rate in zip(updates, rates, strict=True)], weights
        )
        return dict(Scaled(direction, mean_rate, round.parameters)), round.slots

    def _rate_sum(self, update: Contribution) -> float:
        if not self.mu:
            return update.rate_sum
        shrinking = 1 - self.mu * update.rate_sum / update.num_steps
        return (1 - shrinking**update.num_steps) / self.mu


class FedNova(FedAvg):
    """FedAvg that takes the number of local steps out of an update's weight.

    Args:
        mu: strength of a pull to the round's starting model, as FedProx has it; below 2 over the learning rate.
    """

    mu: float = Field(default=0.0, ge=0)
    weighting: Literal["processed", "samples", "uniform"] = "samples"

    @property
    def local_rule(self) -> LocalRule | None:
        """The pull, if there is one."""
        return Proximal(self.mu) if self.mu else None

    @property
    def server_rule(self) -> ServerRule | None:
        """The normalised mean."""
        return NormalisedMean(self.mu)
