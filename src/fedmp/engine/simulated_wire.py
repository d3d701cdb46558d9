"""What travels to and from simulated clients: encoded and decoded as devices and the coordinator would."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from fedmp.client import StateStore, Wire
from fedmp.coordinator import ClientUpdate
from fedmp.engine.session import Session
from fedmp.graph import StateSpec
from fedmp.records import state_key
from fedmp.updates import Decoded

__all__ = ["HandedOut", "SimulatedWire"]


@dataclass(frozen=True, eq=False)
class HandedOut:
    """What clients may pull in a round.

    Attributes:
        payload: as it travels.
        tensors: as clients have it then.
        difference: as it travels to those who have the round before; None if that makes no difference.
    """

    payload: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]
    difference: Mapping[str, torch.Tensor] | None = None


class SimulatedWire:
    """Both channels of all simulated clients, and what their transforms keep.

    Args:
        session: the job under way.
        specs: of the model's tensors.
    """

    def __init__(self, session: Session, specs: Mapping[str, StateSpec]) -> None:
        job = session.prepared.job
        self._model = session.model
        self.uplink, self.downlink = job.uplink_channel(specs), job.downlink_channel(specs)
        self._states = StateStore(session.state_folder, is_durable=False)
        self._pulled: frozenset[str] = frozenset()

    def hand_out(self, round: int) -> HandedOut:
        """The present global model, and what a strategy sends with it."""
        self._model.open(round)
        if self.downlink.chain.keeps_estimate:
            whole = self._model.handed_out
            difference = self._model.difference(round, round - 1)
            return HandedOut(whole, whole, difference and self.downlink.replaced(whole, difference))
        payload, _ = self.downlink.encode(self._model.handed_out, {}, sender="", round=round)
        return HandedOut(payload, Wire("", self.uplink, self.downlink).unpack(payload, round=round))

    def payloads(
        self, handed_out: HandedOut, clients: Collection[str]
    ) -> list[tuple[Mapping[str, torch.Tensor], tuple[str, ...]]]:
        """Which clients receive what, of those who begin with a round; to be asked once in each round."""
        if handed_out.difference is None and not self.downlink.chain.keeps_estimate:
            return [(handed_out.payload, tuple(clients))]
        had = self._pulled if handed_out.difference is not None else frozenset()
        if self.downlink.chain.keeps_estimate:
            self._pulled = frozenset(clients)
        updated = tuple(client for client in clients if client in had)
        others = tuple(client for client in clients if client not in had)
        return [(handed_out.difference or {}, updated), (handed_out.payload, others)]

    def send(self, update: ClientUpdate, base: str) -> tuple[ClientUpdate, Mapping[str, torch.Tensor]]:
        """An update as the coordinator will have it, and as it travels.

        Args:
            update: as the client made it.
            base: names what the client kept, from which it started.
        """
        wire, round = Wire(update.client, self.uplink, self.downlink), update.round
        kept = self._states.load(update.client, base, wanted=Wire.concerns) if wire.keeps_state else {}
        payload, state = wire.pack(update, kept, round=round)
        self._states.save(update.client, state_key(round), "sent", state, base=base)
        if not self.uplink.is_plain:
            held = wire.estimates(kept)
            update = replace(update, tensors=Decoded(payload, self.uplink, update.client, round, held))
        return update, payload
