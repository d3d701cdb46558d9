"""A client's end of the federation plane: global stages as they come in, updates as they go out.

    payload ──unpack──▶ global stages ──local round──▶ update ──pack──▶ payload

Devices and the simulating engine run this same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from fedmp.updates import Channel, Estimates

__all__ = ["Wire"]

_SENT = "sent/"


@dataclass(frozen=True)
class Wire:
    """Both channels of a client.

    Attributes:
        client: its name.
        uplink, downlink: of the job.
    """

    client: str
    uplink: Channel
    downlink: Channel

    @property
    def keeps_state(self) -> bool:
        """Whether the uplink's transforms want to see again what they lost, or what the coordinator holds."""
        return self.uplink.chain.keeps_residual or self.uplink.chain.keeps_estimate

    @staticmethod
    def concerns(state_name: str) -> bool:
        """Whether a tensor of a client's state is of its transforms."""
        return state_name.startswith(_SENT)

    def unpack(
        self,
        payload: Mapping[str, torch.Tensor],
        *,
        round: int,
        held: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> dict[str, torch.Tensor]:
        """The global stages of a round, as near as they were sent.

        Args:
            payload: as it came.
            round: whose.
            held: the stages of the round before, where stages may travel as differences.

        Raises:
            PayloadError: the payload makes no sense.
        """
        if self.downlink.chain.keeps_estimate:
            return self.downlink.receive(payload, sender="", round=round, held=held)
        names = dict.fromkeys(map(self.downlink.name_of, payload))
        return self.downlink.decode_all(payload, names, sender="", round=round)

    def pack(
        self,
        update: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
        *,
        round: int,
        sum_over_devices: Callable[[float], float] = lambda own: own,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """An update as it travels.

        Args:
            update: of all the client, or of one of its devices.
            state: all that the client kept; what is not of the transforms is passed over.
            round: in which the update began.
            sum_over_devices: adds up a number of each of the client's devices, where this is one of several.

        Returns:
            The payload, and what the client keeps for its next one.
        """
        norm = None
        if self.uplink.chain.clip is not None:
            norm = math.sqrt(sum_over_devices(self.uplink.square_sum(update)))
        own = _own(state)
        payload, kept = self.uplink.encode(update, own, sender=self.client, round=round, norm=norm)
        return payload, {_SENT + name: tensor for name, tensor in kept.items()}

    def estimates(self, state: Mapping[str, torch.Tensor]) -> Estimates:
        """What the coordinator holds of the client, by the state that the client kept."""
        return self.uplink.estimates_in(_own(state))

    def forgotten(self, names: Iterable[str], state: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
        """Those of the tensors of an update of which the coordinator may hold something, and the client nothing."""
        held = self.estimates(state)
        return tuple(name for name in self.uplink.estimated(names) if held(name) is None)


def _own(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(_SENT): tensor for name, tensor in state.items() if Wire.concerns(name)}
