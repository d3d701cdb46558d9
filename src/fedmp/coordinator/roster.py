"""What the coordinator remembers of each client from round to round; saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from fedmp.coordinator.clients import ClientUpdate
from fedmp.records import state_key
from fedmp.strategy import ClientFacts, figures

__all__ = ["Roster", "Standing", "after_round", "facts_of", "states_of"]


class Standing(NamedTuple):
    """A client as its last update that counted left it; small, since there may be one of each of 100,000 clients.

    Attributes:
        state: names what the client kept of it, from which it starts its next round; see `state_key`.
        loss: mean loss that it reported.
    """

    state: str
    loss: float | None = None

    @classmethod
    def of_json(cls, value: object) -> Standing:
        """A standing that was written as a list.

        Raises:
            ValueError: it is something else.
        """
        match value:
            case [str(state), float() | int() | None as loss]:
                return cls(state, loss)
        raise ValueError(f"{value!r:.80} is no client's state and loss")


Roster = Mapping[str, Standing]


def after_round(roster: Roster, updates: Sequence[ClientUpdate]) -> dict[str, Standing]:
    """The roster once a round is committed.

    Args:
        roster: before it.
        updates: those that counted.
    """
    clients, *begun, losses = (figures(updates, name) for name in ("client", "round", "generation", "loss"))
    started = list(zip(*begun, strict=True))
    keys = {each: state_key(*each) for each in set(started)}  # one string for all that are alike
    states = map(keys.__getitem__, started)
    return {**roster, **dict(zip(clients, map(Standing, states, losses), strict=True))}


def states_of(roster: Roster) -> Mapping[str, str]:
    """The state of each client that has one."""
    return _States(roster)


class _States(Mapping[str, str]):
    """States told when asked for: a round asks for its cohort's alone."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def __getitem__(self, client: str) -> str:
        return self._roster[client].state

    def __iter__(self) -> Iterator[str]:
        return iter(self._roster)

    def __len__(self) -> int:
        return len(self._roster)


def facts_of(
    clients: Sequence[str], roster: Roster, *, num_samples: Mapping[str, int], unreachable: Collection[str]
) -> Mapping[str, ClientFacts]:
    """What a strategy may go by when it picks a cohort: of each client when it asks."""
    return _Facts(clients, roster, num_samples, unreachable)


class _Facts(Mapping[str, ClientFacts]):
    """Facts made when asked for: few strategies ask, and there may be 100,000 clients."""

    def __init__(
        self,
        clients: Sequence[str],
        roster: Roster,
        num_samples: Mapping[str, int],
        unreachable: Collection[str],
    ) -> None:
        self._clients, self._roster = clients, roster
        self._num_samples, self._unreachable = num_samples, unreachable

    def __getitem__(self, client: str) -> ClientFacts:
        return ClientFacts(
            num_samples=self._num_samples.get(client, 0),
            loss=self._roster[client].loss if client in self._roster else None,
            is_available=client not in self._unreachable,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)
