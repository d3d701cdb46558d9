"""All clients of a job, each set up when it is asked for.

Clients with the same devices and links share a plan, and all share one tensor of row numbers, so that a population of
100,000 is 100,000 row ranges and a few plans.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from fedmp.data import Dataset
from fedmp.engine.setup import ClientSetup
from fedmp.records import Plan
from fedmp.topology import Client

__all__ = ["MANY_CLIENTS", "Population", "Told", "kinds_of"]

MANY_CLIENTS = 500  # of more, reports tell of kinds of clients instead of each

T = TypeVar("T")


class Population(Mapping[str, ClientSetup]):
    """The clients by name, in the topology's order.

    Args:
        clients: of the topology.
        kinds: a set-up of one client of each kind.
        kind_of: each client's.
        data: everyone's samples.
        rows: each client's rows of them.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        kinds: Sequence[ClientSetup],
        kind_of: Sequence[int],
        data: Dataset,
        rows: Sequence[torch.Tensor],
    ) -> None:
        self._clients, self._kinds, self._kind_of, self._data = clients, kinds, kind_of, data
        self.places: Mapping[str, int] = {client.name: place for place, client in enumerate(clients)}
        self._rows = torch.cat(list(rows))
        self._ends: array[int] = array("q", [0, *torch.tensor([len(own) for own in rows]).cumsum(0).tolist()])
        self._examples: dict[tuple[int, int], int] = {}
        self._made: dict[str, ClientSetup] = {}

    def __getitem__(self, name: str) -> ClientSetup:
        if name in self._made:
            return self._made[name]
        place = self.places[name]
        begin, end = self._ends[place], self._ends[place + 1]
        kind = self._kinds[self._kind_of[place]]
        setup = ClientSetup(
            self._clients[place],
            kind.plan,
            kind.pieces,
            kind.moved,
            kind.work,
            self._data,
            self._rows[begin:end],
            end - begin,
        )
        if len(self) <= MANY_CLIENTS:
            self._made[name] = setup
        return setup

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def num_samples(self, name: str) -> int:
        """Samples of a client."""
        place = self.places[name]
        return self._ends[place + 1] - self._ends[place]

    def round_samples(self, name: str) -> int:
        """Samples that a client processes in one round."""
        kind, size = self._kind_of[self.places[name]], self.num_samples(name)
        if (kind, size) not in self._examples:
            self._examples[kind, size] = self._kinds[kind].work.num_examples(size)
        return self._examples[kind, size]

    @property
    def num_devices(self) -> int:
        """Devices that train, of all clients."""
        devices = [kind.plan.num_devices for kind in self._kinds]
        return sum(devices[kind] for kind in self._kind_of)

    @property
    def plans(self) -> dict[str, Plan]:
        """Each client's plan; of a large population each kind's, under the name of its first client."""
        if len(self) <= MANY_CLIENTS:
            return {
                name: self._kinds[kind].plan for name, kind in zip(self.places, self._kind_of, strict=True)
            }
        found: dict[int, list[int]] = {}
        for place, kind in enumerate(self._kind_of):
            found.setdefault(kind, [place, 0])[1] += 1
        return {
            f"{self._clients[first].name} (and {count - 1} like it)": self._kinds[kind].plan
            for kind, (first, count) in found.items()
        }


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


def kinds_of(
    clients: Sequence[Client], set_up: Callable[[Client], ClientSetup]
) -> tuple[list[ClientSetup], Sequence[int]]:
    """One set-up for clients with the same devices and links, and which one each client has.

    Args:
        clients: of the topology.
        set_up: plans a client.

    Raises:
        PlanError: no plan fits a client's devices.
    """
    kinds: list[ClientSetup] = []
    by_text: dict[str, int] = {}
    by_identity: dict[tuple[int, int], int] = {}  # clients made of one description share its parts
    kind_of = array("l")
    for client in clients:
        identity = id(client.devices), id(client.links)
        if identity not in by_identity:
            text = hashlib.sha256(f"{client.devices}{client.links}".encode()).hexdigest()
            if text not in by_text:
                by_text[text] = len(kinds)
                kinds.append(replace(set_up(client), client=client))
            by_identity[identity] = by_text[text]
        kind_of.append(by_identity[identity])
    return kinds, kind_of
