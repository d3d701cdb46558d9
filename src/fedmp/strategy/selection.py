"""Client selection: who takes part in a round, whatever the strategy does with them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.seeds import derive_seed

__all__ = ["NO_FACTS", "Available", "ClientFacts", "PowerOfChoice", "Selection", "Uniform", "Weighted"]


@dataclass(frozen=True)
class ClientFacts:
    """What the coordinator knows of a client when it picks a cohort.

    Attributes:
        num_samples: that it has; 0 while that is not known.
        loss: mean loss that it last reported; None before its first round.
        is_available: whether it can be reached now.
    """

    num_samples: int = 0
    loss: float | None = None
    is_available: bool = True


_UNKNOWN = ClientFacts()
NO_FACTS: Mapping[str, ClientFacts] = MappingProxyType({})


@runtime_checkable
class Selection(Protocol):
    """A way to pick clients."""

    def select(
        self,
        clients: Sequence[str],
        size: int,
        *,
        round: int,
        seed: int,
        facts: Mapping[str, ClientFacts] = NO_FACTS,
    ) -> tuple[str, ...]:
        """Pick clients without replacement.

        Args:
            clients: in client order.
            size: how many; from 1 to their number. Fewer may be picked, but at least one.
            round: about to begin.
            seed: the job's; the same choice for the same seed.
            facts: what is known of the clients.

        Returns:
            Names in client order.
        """
        ...


class Uniform(Component):
    """Every client with the same probability (McMahan et al., 2017, algorithm 1)."""

    def select(
        self,
        clients: Sequence[str],
        size: int,
        *,
        round: int,
        seed: int,
        facts: Mapping[str, ClientFacts] = NO_FACTS,
    ) -> tuple[str, ...]:
        """A uniform sample without replacement."""
        order = torch.randperm(len(clients), generator=_generator(seed, round))
        return _named(clients, order[:size].tolist())


class Weighted(Component):
    """Clients with many samples more often: probabilities in proportion to their samples.

    One client after another is drawn from those that are left (successive sampling). Since a large client is
    picked more often already, weigh the updates of those who are picked alike (`strategy.weighting=uniform`;
    Li et al., 2020, On the Convergence of FedAvg on Non-IID Data, scheme I, but drawn without replacement).
    """

    def select(
        self,
        clients: Sequence[str],
        size: int,
        *,
        round: int,
        seed: int,
        facts: Mapping[str, ClientFacts] = NO_FACTS,
    ) -> tuple[str, ...]:
        """Drawn by samples; a client of which they are not known counts as one with the mean."""
        return _named(clients, _by_samples(clients, size, facts, _generator(seed, round)))


class PowerOfChoice(Component):
    """Of some candidates those with the highest loss (Cho et al., 2020, Client Selection in FL, section 3).

    The candidates are drawn by their samples. As in the paper's communication-efficient variant rpow-d, a
    client's loss is the one that it reported when it last took part, so nothing more is sent; clients that never
    took part come first.

    Args:
        num_candidates: d of the paper; more favour high losses more strongly. At least the size of the cohort.
    """

    num_candidates: int = Field(default=20, ge=1)

    def select(
        self,
        clients: Sequence[str],
        size: int,
        *,
        round: int,
        seed: int,
        facts: Mapping[str, ClientFacts] = NO_FACTS,
    ) -> tuple[str, ...]:
        """The highest losses among the candidates; the one drawn first where they are alike."""
        drawn = _by_samples(clients, max(size, self.num_candidates), facts, _generator(seed, round))
        losses = {index: _loss_of(clients[index], facts) for index in drawn}
        return _named(clients, sorted(drawn, key=lambda index: -losses[index])[:size])


class Available(Component):
    """Only clients that can be reached now; others are asked when they are back.

    Args:
        among: how to pick among those.
    """

    among: Selection = Field(default_factory=Uniform)

    def select(
        self,
        clients: Sequence[str],
        size: int,
        *,
        round: int,
        seed: int,
        facts: Mapping[str, ClientFacts] = NO_FACTS,
    ) -> tuple[str, ...]:
        """As many as are there, at most; all clients count where nobody is, since a round needs someone."""
        there = [name for name in clients if facts.get(name, _UNKNOWN).is_available] or clients
        return self.among.select(there, min(size, len(there)), round=round, seed=seed, facts=facts)


def _generator(seed: int, round: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "cohort", round))


def _by_samples(
    clients: Sequence[str], size: int, facts: Mapping[str, ClientFacts], generator: torch.Generator
) -> list[int]:
    """Indices drawn without replacement with probabilities in proportion to samples, in the order drawn.

    The smallest of independent exponential times with these rates come first, which is the same
    (Efraimidis and Spirakis, 2006, Weighted random sampling with a reservoir).
    """
    samples = [facts.get(name, _UNKNOWN).num_samples for name in clients]
    known = [number for number in samples if number > 0]
    mean = sum(known) / len(known) if known else 1.0
    rates = torch.tensor([number or mean for number in samples], dtype=torch.float64)
    times = torch.empty(len(clients), dtype=torch.float64).exponential_(generator=generator) / rates
    drawn: list[int] = times.argsort(stable=True)[:size].tolist()
    return drawn


def _loss_of(client: str, facts: Mapping[str, ClientFacts]) -> float:
    loss = facts.get(client, _UNKNOWN).loss
    return math.inf if loss is None else loss


def _named(clients: Sequence[str], chosen: Collection[int]) -> tuple[str, ...]:
    places = set(chosen)
    if len(places) == len(clients):
        return tuple(clients)
    return tuple(clients[place] for place in sorted(places))
