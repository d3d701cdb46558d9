"""All clients of a job, each set up when it is asked for.

Clients that are alike share a description and a plan, and all share one tensor of row numbers, so that a population
of 100,000 is 100,000 row ranges and a few plans. A client's own record is made when it is asked for,
and only those asked for last are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, TypeVar, overload

import numpy as np

from fedmp.client import LocalWork
from fedmp.data import Dataset, Rows
from fedmp.engine.setup import ClientSetup
from fedmp.records import Plan
from fedmp.topology import Client, ClientList

__all__ = ["MANY_CLIENTS", "Amount", "Population", "SomeClients", "Told", "set_up_groups"]

MANY_CLIENTS = 500  # of more, reports tell of kinds of clients instead of each

_REMEMBERED = 1024  # clients that were asked for last, of some 5 kB each
_PLACED = 8192  # of which the place was asked for last, of some 150 bytes each

T = TypeVar("T")


class Population(Mapping[str, ClientSetup]):
    """The clients by name, in the topology's order.

    Args:
        clients: of the topology.
        setups: for each of their groups, of a client that is like them.
        data: everyone's samples.
        rows: each client's of them.

    Attributes:
        rows: the same.
        place: the place of a client among all, by its name; KeyError if there is none of this name.
        round_samples: samples that a client processes in one round, alike.
    """

    def __init__(self, clients: ClientList, setups: Sequence[ClientSetup], data: Dataset, rows: Rows) -> None:
        self._clients, self._setups, self._data, self.rows = clients, list(setups), data, rows
        self._works = {id(setup.work) for setup in setups}  # those live as long as this
        self._amounts: dict[tuple[int, int], Amount] = {}
        self._latest: SomeClients | None = None
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._make)
        self.place = lru_cache(maxsize=_PLACED)(clients.place)
        self.round_samples = lru_cache(maxsize=_PLACED)(self._round_samples)

    def __getitem__(self, name: str) -> ClientSetup:
        return self._remembered(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients.names)

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, name: object) -> bool:
        return name in self._clients.names

    @property
    def names(self) -> Sequence[str]:
        """Of all clients, in order."""
        return self._clients.names

    def some(self, names: Iterable[str]) -> SomeClients:
        """These clients.

        Raises:
            KeyError: there is none of one of the names.
        """
        wanted = tuple(names)
        if self._latest is None or wanted != self._latest.names:  # often all clients, in each round
            self._latest = SomeClients(self, wanted)
        return self._latest

    def num_samples(self, name: str) -> int:
        """Samples of a client."""
        return self.rows.size(self.place(name))

    def amount(self, work: LocalWork, num_samples: int) -> Amount:
        """How much a work is on so many samples; of a kind's own work found out once."""
        if id(work) not in self._works:
            return Amount.of(work, num_samples)
        key = id(work), num_samples
        if key not in self._amounts:
            self._amounts[key] = Amount.of(work, num_samples)
        return self._amounts[key]

    def kinds(self, places: Sequence[int]) -> list[ClientSetup]:
        """For each of these places a client that has the same devices, links and plan as the one there."""
        if len(self._setups) == 1:
            return self._setups * len(places)
        return [self._like(place) for place in places]

    @property
    def num_devices(self) -> int:
        """Devices that train, of all clients."""
        groups = zip(self._clients.groups, self._setups, strict=True)
        return sum(group.count * setup.plan.num_devices for group, setup in groups)

    @property
    def plans(self) -> dict[str, Plan]:
        """Each client's plan; of a large population each kind's, under the name of its first client."""
        if len(self) <= MANY_CLIENTS:
            return {name: self._like(place).plan for place, name in enumerate(self.names)}
        counts: dict[int, int] = {}
        for group, setup in zip(self._clients.groups, self._setups, strict=True):
            counts[id(setup)] = counts.get(id(setup), 0) + group.count
        firsts = {id(setup): setup for setup in self._setups}
        return {
            f"{setup.name} (and {counts[kind] - 1} like it)": setup.plan for kind, setup in firsts.items()
        }

    def _make(self, name: str) -> ClientSetup:
        place = self.place(name)
        return replace(
            self._like(place),
            client=self._clients[place],
            data=self._data,
            rows=self.rows[place],
            num_samples=self.rows.size(place),
        )

    def _like(self, place: int) -> ClientSetup:
        return self._setups[self._clients.group(place)]

    def _round_samples(self, name: str) -> int:
        place = self.place(name)
        return self.amount(self._like(place).work, self.rows.size(place)).examples


class Amount(NamedTuple):
    """How much a client does in a round."""

    batches: int
    examples: int
    steps: int

    @classmethod
    def of(cls, work: LocalWork, num_samples: int) -> Amount:
        """Of a work on so many samples."""
        return cls(work.num_batches(num_samples), work.num_examples(num_samples), work.num_steps(num_samples))


class SomeClients(Sequence[ClientSetup]):
    """Some clients of a population: a little of all at once, each one's setup when it is asked for.

    Args:
        population: of all.
        names: of these.

    Attributes:
        names: the same.
        places: [K] where they are among all.
        sizes: samples of each.
        kinds: for each a client with the same devices, links and plan, which may be itself.
    """

    def __init__(self, population: Population, names: tuple[str, ...]) -> None:
        self._population, self.names = population, names
        places = list(map(population.place, names))
        self.places = np.array(places, dtype=np.int64)
        self.sizes: list[int] = population.rows.spans(self.places)[1].tolist()
        self.kinds = population.kinds(places)
        self._amounts: tuple[int, list[Amount]] = (-1, [])  # of the round that was asked for last

    @property
    def rows(self) -> Rows:
        """Of all clients of the population."""
        return self._population.rows

    def take(self, which: Sequence[int]) -> SomeClients:
        """Those at these indices."""
        return SomeClients(self._population, tuple(self.names[index] for index in which))

    def amounts(self, round: int) -> list[Amount]:
        """How much each one does in a round."""
        if self._amounts[0] != round:
            self._amounts = round, self._find_amounts(round)
        return self._amounts[1]

    def pipeline_bytes(self, round: int) -> list[int]:
        """Bytes between each one's devices in a round."""
        alike = list(zip(self.kinds, self.amounts(round), strict=True))
        found = {(kind, amount): kind.pipeline_bytes(amount.examples) for kind, amount in set(alike)}
        return list(map(found.__getitem__, alike))

    def _find_amounts(self, round: int) -> list[Amount]:
        amount = self._population.amount
        if any(kind.work.effort for kind in set(self.kinds)):
            works = [
                kind.work.of_round(name, round) for kind, name in zip(self.kinds, self.names, strict=True)
            ]
            return list(map(amount, works, self.sizes))
        alike = list(zip(self.kinds, self.sizes, strict=True))
        found = {(kind, size): amount(kind.work, size) for kind, size in set(alike)}
        return list(map(found.__getitem__, alike))

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> ClientSetup: ...
    @overload
    def __getitem__(self, index: slice) -> SomeClients: ...
    def __getitem__(self, index: int | slice) -> ClientSetup | SomeClients:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return self._population[self.names[index]]


class Told(Mapping[str, T]):
    """Something of each client, found out when it is asked for.

    Args:
        clients: of whom.
        tell: finds it out.
    """

    def __init__(self, clients: Mapping[str, ClientSetup], tell: Callable[[str], T]) -> None:
        self._clients, self._tell = clients, tell

    def __getitem__(self, name: str) -> T:
        return self._tell(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)


def set_up_groups(clients: ClientList, set_up: Callable[[Client], ClientSetup]) -> list[ClientSetup]:
    """For each group of clients one that is like them, ready to train: the same for the same devices and links.

    Args:
        clients: of the topology.
        set_up: plans a client.

    Raises:
        PlanError: no plan fits a client's devices.
    """
    by_text: dict[str, ClientSetup] = {}
    by_identity: dict[tuple[int, int], str] = {}  # clients made of one description share its parts
    setups = []
    for client in (group.first for group in clients.groups):
        identity = id(client.devices), id(client.links)
        if identity not in by_identity:
            by_identity[identity] = hashlib.sha256(f"{client.devices}{client.links}".encode()).hexdigest()
        text = by_identity[identity]
        if text not in by_text:
            by_text[text] = set_up(client)
        setups.append(by_text[text])
    return setups
