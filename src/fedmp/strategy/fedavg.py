"""Federated averaging (McMahan et al., 2017, Communication-Efficient Learning, algorithm 1).

    x_{t+1} = sum_k n_k / n  y_k

with y_k the weights of client k after its local training from x_t, and n_k the samples that it processed. We send
and average differences y_k - x_t, which is the same, and lets a server optimizer follow them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from fedmp.errors import ConfigError
from fedmp.graph import StateSpec
from fedmp.strategy.closing import ClosingRules
from fedmp.strategy.effort import Effort
from fedmp.strategy.rules import Contribution, LocalRule, ServerRule, figures
from fedmp.strategy.scope import Scope, names_like
from fedmp.strategy.selection import NO_FACTS, ClientFacts, Selection, Uniform
from fedmp.strategy.strategy import ServerOptimizer

__all__ = ["FedAvg"]


class FedAvg(ClosingRules):
    """Local training on a sampled cohort, then the weighted mean of the updates. The base of all other strategies.

    Args:
        local_epochs: passes over the client's data in one round; 0.25 averages four times in a pass.
        local_steps: if given, so many optimizer steps instead, going round the data as often as needed.
        effort: which clients do only a part of that; None: all do all of it.
        selection: how the cohort is picked.
        weighting: what an update counts for: "processed", the samples that the client processed in the round;
            "samples", those that it has, whatever part of its work it did; "uniform", all alike.
        keep_statistics_local: leave batch-norm statistics at the clients instead of averaging them
            (the server's own copy then stays as it began).
        keep_local: patterns of names of tensors that stay at the clients, such as `head.*` for a head of each
            client's own (Arivazhagan et al., 2019, Federated Learning with Personalization Layers).

    How large a cohort is, and when a round closes, is said with the fields of `ClosingRules`.
    """

    local_epochs: float = Field(default=1, gt=0)
    local_steps: int | None = Field(default=None, ge=1)
    effort: Effort | None = None
    selection: Selection = Field(default_factory=Uniform)
    weighting: Literal["processed", "samples", "uniform"] = "processed"
    keep_statistics_local: bool = False
    keep_local: tuple[str, ...] = ()

    @property
    def needs_losses(self) -> bool:
        """False."""
        return False

    @property
    def keeps_optimizer(self) -> bool:
        """False: a client optimizer's state is made anew in each round."""
        return False

    @property
    def local_rule(self) -> LocalRule | None:
        """None: clients follow the gradient."""
        return None

    @property
    def server_rule(self) -> ServerRule | None:
        """None: the aggregator's result is the update."""
        return None

    @property
    def server_optimizer(self) -> ServerOptimizer | None:
        """None: the update is applied as it is."""
        return None

    def cohort(
        self,
        clients: Sequence[str],
        *,
        round: int,
        seed: int,
        size: int | None = None,
        facts: Mapping[str, ClientFacts] = NO_FACTS,
    ) -> tuple[str, ...]:
        """As the selection picks them, without those who would do no work if others are left.

        Where it picks fewer than `min_clients`, since others cannot be reached, some of those are asked all the same:
        the round waits for them.
        """
        size = self.closing(len(clients)).num_training if size is None else size
        chosen = self.selection.select(clients, size, round=round, seed=seed, facts=facts)
        if num_missing := max(0, min(self.min_clients or 1, size) - len(chosen)):
            asked = set(chosen)
            others = [name for name in clients if name not in asked]
            asked.update(Uniform().select(others, num_missing, round=round, seed=seed))
            chosen = tuple(name for name in clients if name in asked)
        if self.effort is None:
            return chosen
        effort = self.effort
        working = tuple(name for name in chosen if effort.share(name, round=round, seed=seed) > 0)
        return working or chosen[:1]

    def weights(self, updates: Sequence[Contribution]) -> list[float]:
        """By `weighting`."""
        if self.weighting == "uniform":
            return [1.0] * len(updates)
        if self.weighting == "samples":
            return list(map(float, figures(updates, "num_samples")))
        return list(map(float, figures(updates, "num_examples")))

    def scope(self, specs: Mapping[str, StateSpec]) -> Scope:
        """All tensors travel but those that are kept local.

        Raises:
            ConfigError: a pattern of `keep_local` fits nothing.
        """
        buffers = {name for name, spec in specs.items() if spec.kind == "buffer"}
        try:
            own = names_like(specs, self.keep_local)
        except ValueError as error:
            raise ConfigError(f"strategy.keep_local: {error}") from error
        return Scope(own=own | (buffers if self.keep_statistics_local else set()))
