"""What a strategy adds to federated averaging: a rule for the clients' steps, a rule for the server's.

Rules are small frozen objects of pure functions on single tensors. They hold for a stage, for a whole model,
and for the stacked tensors of a cohort alike, so no process needs the whole model to follow one. State goes
in and comes out by slot: a slot is a name under which there is one tensor of each trained parameter's shape,
zeros at first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

__all__ = [
    "Combine",
    "Contribution",
    "LocalRule",
    "Scaled",
    "ServerRound",
    "ServerRule",
    "Slots",
    "figures",
    "kept_name",
    "received_name",
]

Combine: TypeAlias = Callable[
    [Sequence[Mapping[str, torch.Tensor]], Sequence[float]], dict[str, torch.Tensor]
]
Slots: TypeAlias = Mapping[str, Mapping[str, torch.Tensor]]


def received_name(slot: str, name: str) -> str:
    """The name under which a server's slot of a parameter travels to the clients.

    Example:
        >>> received_name("control", "head.weight")
        '@control/head.weight'
    """
    return f"@{slot}/{name}"


def kept_name(slot: str, name: str) -> str:
    """The name under which a client keeps a slot of a parameter.

    Example:
        >>> kept_name("control", "head.weight")
        'kept/control/head.weight'
    """
    return f"kept/{slot}/{name}"


@runtime_checkable
class LocalRule(Protocol):
    """Corrects a client's gradients; goes to the devices as part of their work, so it must pickle.

    Both functions must treat elements alike (no sums over a tensor): a device has a piece of the model, a
    simulator the tensors of many clients stacked.
    """

    @property
    def received(self) -> tuple[str, ...]:
        """Slots of the server that the coordinator hands out along with the parameters."""
        ...

    @property
    def kept(self) -> tuple[str, ...]:
        """Slots that a client keeps from round to round."""
        ...

    def correct(
        self,
        gradient: torch.Tensor,
        parameter: torch.Tensor,
        *,
        start: torch.Tensor,
        received: Mapping[str, torch.Tensor],
        kept: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The gradient that the client optimizer follows.

        Args:
            gradient: of the loss, complete: tied sums done, clipped where the job clips. May be changed in place.
            parameter: its present value.
            start: its value when the round began.
            received, kept: its tensors by slot.
        """
        ...

    def keep(
        self,
        change: torch.Tensor,
        *,
        received: Mapping[str, torch.Tensor],
        kept: Mapping[str, torch.Tensor],
        rate_sum: torch.Tensor | float,
    ) -> dict[str, torch.Tensor]:
        """What the client keeps of a parameter after a round, by slot.

        Args:
            change: of the parameter over the round.
            received, kept: as the round went by.
            rate_sum: the sum of the coefficients with which the round's gradients went into the change: with
                plain SGD the sum of the steps' learning rates.
        """
        ...


class Contribution(Mapping[str, torch.Tensor]):
    """A client's update with what its report says; may read each tensor from disk when asked."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Samples that it processed."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Samples that it has."""

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Optimizer steps that it made."""

    @property
    @abstractmethod
    def rate_sum(self) -> float:
        """The sum of the coefficients of its gradients, above 0; see `LocalRule.keep`."""

    @property
    @abstractmethod
    def start_loss(self) -> float | None:
        """Mean loss of the round's starting model on its data; None where that was not asked for."""


def figures(updates: Sequence[Contribution], name: str) -> Sequence[Any]:
    """One attribute of each update, in order: what its report says.

    A thousand simulated clients have no update each until somebody asks; such a sequence has a method `figures` of its
    own, which gives the attribute of all of them.

    Args:
        updates: of a round.
        name: of the attribute, such as "num_examples".
    """
    of_all = getattr(updates, "figures", None)
    return of_all(name) if of_all is not None else [getattr(update, name) for update in updates]


@dataclass(frozen=True, eq=False)
class ServerRound:
    """What a round has brought, and what the server has to make something of it.

    Attributes:
        updates: of the clients that finished, in client order; take them one tensor at a time.
        weights: of the clients, as the strategy weighs them.
        combine: the job's aggregator; a rule that combines by nothing else works with every one, and is as
            robust as it is.
        parameters: names of the trained parameters; an update holds buffers beside them, such as batch-norm
            statistics, which are averaged and nothing else.
        slots: the present state of each trained parameter.
        num_clients: of the whole job.
    """

    updates: Sequence[Contribution]
    weights: Sequence[float]
    combine: Combine
    parameters: Container[str]
    slots: Slots
    num_clients: int

    @property
    def share(self) -> float:
        """Of the job's clients, those whose updates these are."""
        return len(self.updates) / self.num_clients

    def combined(self) -> dict[str, torch.Tensor]:
        """The aggregator's result."""
        return self.combine(self.updates, self.weights)


@runtime_checkable
class ServerRule(Protocol):
    """Makes one update of the clients', at the coordinator."""

    @property
    def slots(self) -> tuple[str, ...]:
        """State that it keeps for each trained parameter; saved with every checkpoint."""
        ...

    def step(self, round: ServerRound) -> tuple[dict[str, torch.Tensor], Slots]:
        """The update to apply, and the state after it."""
        ...


@dataclass(frozen=True, eq=False)
class Scaled(Mapping[str, torch.Tensor]):
    """An update of which some tensors are multiplied by a number, each when it is asked for.

    Attributes:
        tensors: the update.
        factor: the number.
        names: of the tensors that it holds for; the others stay as they are.
    """

    tensors: Mapping[str, torch.Tensor]
    factor: float
    names: Container[str]

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor * self.factor if name in self.names else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
