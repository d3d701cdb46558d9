"""A client's end of the federation plane: global stages as they come in, updates as they go out.

    payload ──unpack──▶ global stages ──local round──▶ update ──pack──▶ payload

Devices and the simulating engine run this same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fedmp.updates import Channel

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
        """Whether the uplink's transforms want to see again what they lost."""
        return self.uplink.chain.keeps_residual

    @staticmethod
    def concerns(state_name: str) -> bool:
        """Whether a tensor of a client's state is of its transforms."""
        return state_name.startswith(_SENT)

    def unpack(self, payload: Mapping[str, torch.Tensor], *, round: int) -> dict[str, torch.Tensor]:
        """The global stages of a round, as near as they were sent.

        Raises:
            PayloadError: the payload makes no sense.
        """
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
        own = {name.removeprefix(_SENT): tensor for name, tensor in state.items() if self.concerns(name)}
        payload, kept = self.uplink.encode(update, own, sender=self.client, round=round, norm=norm)
        return payload, {_SENT + name: tensor for name, tensor in kept.items()}
