"""What the coordinator holds of each client's last update that counted, where updates travel as differences to that.

One update a client, on disk, under the key of the state that the client kept with it (`fedmp.records.state_key`): so
both sides go on from the same one, whatever became of the rounds between. What a round leaves is saved before the
round is committed, beside what it started from; so a round that is closed again after a restart gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch

from fedmp.coordinator.clients import ClientUpdate
from fedmp.records import state_key
from fedmp.updates import Channel, Estimates, PayloadError, no_estimates

__all__ = ["EstimateBook", "EstimateStore"]


class EstimateStore(Protocol):
    """Named tensors by client and key; `fedmp.client.StateStore` is one."""

    def load(self, client: str, key: str, *, wanted: Callable[[str], bool]) -> Mapping[str, torch.Tensor]:
        """Those of a client's tensors under a key that are wanted; empty if there are none."""
        ...

    def save(self, client: str, key: str, part: str, state: Mapping[str, torch.Tensor], *, base: str) -> None:
        """Save tensors, whole or not at all; all of the client's keys but this and `base` are let go."""
        ...


class EstimateBook:
    """Reads and writes what is held of clients.

    Args:
        store: where; None where the channel keeps no estimates.
        uplink: that updates come through.
    """

    def __init__(self, store: EstimateStore | None, uplink: Channel) -> None:
        self._store = store
        self._uplink = uplink

    def of(self, client: str, key: str, forgotten: Collection[str] = ()) -> Estimates:
        """What is held of a client.

        Args:
            client: whose.
            key: of the state that its update started from; empty for its first.
            forgotten: tensors of which the client holds nothing any more.

        Returns:
            A function that reads one tensor; it raises `PayloadError` where the client holds what is not here.
        """
        store = self._store
        if store is None or not key:
            return no_estimates
        lost = frozenset(forgotten)

        def held(name: str) -> torch.Tensor | None:
            if name in lost or not self._uplink.estimated([name]):
                return None
            found = store.load(client, key, wanted=lambda other: other == name)
            if name not in found:
                raise PayloadError(
                    f"the coordinator holds nothing of {client} under {key!r} to which the difference that was sent "
                    f"could be added; resume with the whole folder of the run, or begin a new one",
                    "no-estimate",
                )
            return found[name]

        return held

    def remember(self, update: ClientUpdate, base: str) -> None:
        """Hold an update that counts from now on, without letting go of the one before.

        Args:
            update: decoded.
            base: key of what it started from.
        """
        names = set(self._uplink.estimated(update))
        if self._store is None or not names:
            return
        others = self._store.load(update.client, base, wanted=lambda name: name not in names)
        held = {**others, **{name: update[name] for name in sorted(names)}}
        key = state_key(update.round, update.reports[0].generation)
        self._store.save(update.client, key, "held", held, base=base)
