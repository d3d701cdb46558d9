"""What the coordinator remembers of each client from round to round; saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from fedmp.coordinator.clients import ClientUpdate
from fedmp.records import state_key
from fedmp.strategy import ClientFacts

__all__ = ["Roster", "Standing", "after_round", "facts_of"]


class Standing(BaseModel):
    """A client as its last update that counted left it.

    Attributes:
        state: names what the client kept of it, from which it starts its next round; see `state_key`.
        loss: mean loss that it reported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: str
    loss: float | None = None


Roster = Mapping[str, Standing]


def after_round(roster: Roster, updates: Sequence[ClientUpdate]) -> dict[str, Standing]:
    """The roster once a round is committed.

    Args:
        roster: before it.
        updates: those that counted.
    """
    standings = {
        update.client: Standing(state=state_key(update.round, update.reports[0].generation), loss=update.loss)
        for update in updates
    }
    return {**roster, **standings}


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
