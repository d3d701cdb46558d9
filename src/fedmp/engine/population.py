"""All clients of a job, each set up when it is asked for.

Clients that are alike share a description and a plan, and all share one tensor of row numbers, so that a population
of 100,000 is 100,000 row ranges and a few plans. A client's own record is made when it is asked for,
and only those asked for last are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from fedmp.data import Dataset, Rows
from fedmp.engine.setup import ClientSetup
from fedmp.records import Plan
from fedmp.topology import Client, ClientList

__all__ = ["MANY_CLIENTS", "Population", "Told", "set_up_groups"]

MANY_CLIENTS = 500  # of more, reports tell of kinds of clients instead of each

_REMEMBERED = 1024  # clients that were asked for last, of some 5 kB each

T = TypeVar("T")


class Population(Mapping[str, ClientSetup]):
    """The clients by name, in the topology's order.

    Args:
        clients: of the topology.
        setups: for each of their groups, of a client that is like them.
        data: everyone's samples.
        rows: each client's of them.
    """

    def __init__(self, clients: ClientList, setups: Sequence[ClientSetup], data: Dataset, rows: Rows) -> None:
        self._clients, self._setups, self._data, self._rows = clients, setups, data, rows
        self._examples: dict[tuple[int, int], int] = {}
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._make)

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

    def place(self, name: str) -> int:
        """The place of a client among all.

        Raises:
            KeyError: there is none of this name.
        """
        return self._clients.place(name)

    def num_samples(self, name: str) -> int:
        """Samples of a client."""
        return self._rows.size(self.place(name))

    def round_samples(self, name: str) -> int:
        """Samples that a client processes in one round."""
        place = self.place(name)
        work, size = self._setup(place).work, self._rows.size(place)
        key = id(work), size  # the works of all groups live as long as this
        if key not in self._examples:
            self._examples[key] = work.num_examples(size)
        return self._examples[key]

    @property
    def num_devices(self) -> int:
        """Devices that train, of all clients."""
        groups = zip(self._clients.groups, self._setups, strict=True)
        return sum(group.count * setup.plan.num_devices for group, setup in groups)

    @property
    def plans(self) -> dict[str, Plan]:
        """Each client's plan; of a large population each kind's, under the name of its first client."""
        if len(self) <= MANY_CLIENTS:
            return {name: self._setup(place).plan for place, name in enumerate(self.names)}
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
            self._setup(place),
            client=self._clients[place],
            data=self._data,
            rows=self._rows[place],
            num_samples=self._rows.size(place),
        )

    def _setup(self, place: int) -> ClientSetup:
        """Of a client that is like the one at this place."""
        return self._setups[self._clients.group(place)]


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
