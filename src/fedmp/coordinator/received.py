"""The global model as clients have it, where it travels to them as compressed differences.

The downlink's half of EF21 (Fatkhullin et al., 2021, EF21 with Bells & Whistles, algorithm 5, EF21-BC): with x_r the
global model of round r and w_r what clients receive of it,

    d_r = C(x_r - w_{r-1}),      w_r = w_{r-1} + d_r,      w_0 = x_1.

w_r is the same for all clients, whether one holds w_{r-1} and is sent d_r, or is sent w_r whole, since it is new, was
away, or was started anew. So the coordinator need not know who holds what: a device says which round's it holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedmp.updates import Channel

__all__ = ["ReceivedModel"]

_ESTIMATE = "estimate/"


class ReceivedModel:
    """What clients have, round after round.

    Args:
        channel: the job's downlink, whose chain keeps estimates.
        state: the model before the first round.
    """

    def __init__(self, channel: Channel, state: Mapping[str, torch.Tensor]) -> None:
        self._channel = channel
        self._names = channel.estimated(state)
        self._kept = {_ESTIMATE + name: state[name].clone() for name in self._names}
        self._round = 0
        self._difference: Mapping[str, torch.Tensor] = {}

    def open(self, round: int, state: Mapping[str, torch.Tensor]) -> None:
        """Work out what the clients of a round receive of the present model; once a round."""
        if round != self._round:
            model = {name: state[name] for name in self._names}
            self._difference, self._kept = self._channel.encode(model, self._kept, sender="", round=round)
            self._round = round

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Of the open round, as clients have them in the end."""
        return {name: self._kept[_ESTIMATE + name] for name in self._names}

    def difference(self, round: int, held: int) -> Mapping[str, torch.Tensor] | None:
        """The payload that leads from one round's to another's; None where whole stages are needed."""
        return self._difference if round == self._round and held == round - 1 > 0 else None

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """What a later process needs to go on, by name."""
        return dict(self._kept)

    def load(self, kept: Mapping[str, torch.Tensor]) -> bool:
        """Put back what `kept` returned; False, and nothing, if it is not of this model."""
        if not {_ESTIMATE + name for name in self._names} <= kept.keys():
            return False
        self._kept = dict(kept)
        return True
