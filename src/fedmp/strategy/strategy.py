"""The strategy of a job: who takes part, how much local work they do, and what is done beyond averaging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from fedmp.graph import StateSpec
from fedmp.strategy.closing import Closing
from fedmp.strategy.effort import Effort
from fedmp.strategy.rules import Contribution, LocalRule, ServerRule
from fedmp.strategy.scope import Scope
from fedmp.strategy.selection import NO_FACTS, ClientFacts

__all__ = ["ServerOptimizer", "Strategy"]

ServerOptimizer = Callable[[Any], torch.optim.Optimizer]


@runtime_checkable
class Strategy(Protocol):
    """Everything that the engines ask of a strategy. `FedAvg` has it all: inherit from it, and change a part."""

    @property
    def local_epochs(self) -> float:
        """Passes over the client's data in one round; may be a fraction."""
        ...

    @property
    def local_steps(self) -> int | None:
        """Optimizer steps in one round; None for whole epochs."""
        ...

    @property
    def effort(self) -> Effort | None:
        """How much of that each client does; None for all of it."""
        ...

    def closing(self, num_clients: int) -> Closing:
        """How many train at a time, and when a round closes, in a job with so many clients."""
        ...

    @property
    def needs_losses(self) -> bool:
        """Whether clients evaluate the round's starting model, even if the job does not ask for it."""
        ...

    @property
    def keeps_optimizer(self) -> bool:
        """Whether the state of the client optimizers lives on from round to round."""
        ...

    @property
    def local_rule(self) -> LocalRule | None:
        """How clients correct their gradients; None for not at all."""
        ...

    @property
    def server_rule(self) -> ServerRule | None:
        """How the clients' updates become one; None for the aggregator alone."""
        ...

    @property
    def server_optimizer(self) -> ServerOptimizer | None:
        """Makes the optimizer that follows the pseudo-gradient, if the job names none; None averages."""
        ...

    def cohort(
        self,
        clients: Sequence[str],
        *,
        round: int,
        seed: int,
        size: int | None = None,
        facts: Mapping[str, ClientFacts] = NO_FACTS,
    ) -> tuple[str, ...]:
        """The clients that begin with one round, in client order.

        Args:
            clients: those that are free, in client order.
            round, seed: the choice is the same for the same.
            size: how many of these; None for as many as the strategy wants itself.
            facts: what the coordinator knows of the clients by now.
        """
        ...

    def weights(self, updates: Sequence[Contribution]) -> list[float]:
        """How much each update counts; positive."""
        ...

    def scope(self, specs: Mapping[str, StateSpec]) -> Scope:
        """Which of a model's tensors travel.

        Raises:
            ConfigError: the strategy does not fit the model.
        """
        ...
