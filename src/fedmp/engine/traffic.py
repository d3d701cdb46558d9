"""Bytes that a simulated client's devices would move: of the same bodies as real devices send and receive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from fedmp.client import stage_body, update_body
from fedmp.engine.setup import ClientSetup, Piece
from fedmp.records import DeviceReport
from fedmp.updates import Channel

__all__ = ["Traffic"]

# the sums of a typical report have all their digits, and its device knows its pipeline: neither compresses
_REPORT = DeviceReport(
    num_examples=512,
    num_samples=512,
    num_steps=16,
    rate_sum=0.8000000000000002,
    loss_sum=183.52761840820312,
    weight=512.0,
    num_correct=437.0,
    pipeline_bytes=104857,
    train_s=0.7310585786300049,
    generation="9b1c60de57f3a824",
)

_Looks = tuple[tuple[str, torch.dtype, torch.Size], ...]


class Traffic:
    """Counts bodies, each device's by itself.

    Without entropy coding a body's length depends on names, dtypes and shapes alone, and is found out once.

    Args:
        uplink, downlink: of the job.
    """

    def __init__(self, uplink: Channel, downlink: Channel) -> None:
        self._uplink = uplink
        self._downlink = downlink
        self._known: dict[tuple[bool, _Looks], int] = {}
        # clients that are cut alike share their pieces, which are held here so that ids stay theirs
        self._alike: dict[tuple[int, tuple[str, ...]], tuple[Sequence[Piece], int]] = {}

    def up(self, setup: ClientSetup, payload: Mapping[str, torch.Tensor]) -> int:
        """Bytes of a client's update.

        Args:
            setup: whose; its plan decides which device sends what.
            payload: the transformed update.
        """
        home = {name: rank for rank, names in enumerate(_pushed(setup)) for name in names}
        bodies: list[dict[str, torch.Tensor]] = [{} for _ in setup.plan.placement]
        for part, tensor in payload.items():
            bodies[home[self._uplink.name_of(part)]][part] = tensor
        return sum(self._length(body, is_update=True) for body in bodies)

    def plain_up(self, setup: ClientSetup, names: Iterable[str], like: Mapping[str, torch.Tensor]) -> int:
        """Bytes of an update of which every tensor travels as it is, so that none needs to be looked at.

        Args:
            setup: whose.
            names: of its tensors.
            like: tensors of the same dtypes and shapes.
        """
        key = id(setup.pieces), tuple(names)
        if key not in self._alike:
            num_bytes = self.up(setup, {name: like[name] for name in key[1]})
            self._alike[key] = setup.pieces, num_bytes
        return self._alike[key][1]

    def down(
        self, setup: ClientSetup, payload: Mapping[str, torch.Tensor], *, round: int, is_first: bool
    ) -> int:
        """Bytes of a client's global stages.

        Args:
            setup: whose.
            payload: all that clients may pull, transformed.
            round: about to begin.
            is_first: the client has no values of its own yet.
        """
        of: dict[str, list[str]] = {}
        for part in payload:
            of.setdefault(self._downlink.name_of(part), []).append(part)
        return sum(
            self._length({part: payload[part] for name in names for part in of[name]}, is_update=False)
            for names in _pulled(setup, round, is_first=is_first)
        )

    def _length(self, body: Mapping[str, torch.Tensor], *, is_update: bool) -> int:
        zstd = (self._uplink if is_update else self._downlink).chain.zstd
        looks = is_update, tuple((name, tensor.dtype, tensor.shape) for name, tensor in body.items())
        if zstd is None and looks in self._known:
            return self._known[looks]
        made = update_body(body, _REPORT, zstd) if is_update else stage_body(body, zstd)
        if zstd is None:
            self._known[looks] = len(made.content)
        return len(made.content)


def _pushed(setup: ClientSetup) -> list[list[str]]:
    """The tensors that each device of a client owns."""
    return [
        [name for stage in stages for name in setup.pieces[stage].owned] for stages in setup.plan.placement
    ]


def _pulled(setup: ClientSetup, round: int, *, is_first: bool) -> list[tuple[str, ...]]:
    """The tensors that each device of a client pulls."""
    pulled = []
    for stages in setup.plan.placement:
        pieces = [setup.pieces[stage] for stage in stages]
        names = dict.fromkeys(name for piece in pieces for name in piece.state)
        everything = (*names, *setup.received(pieces))
        pulled.append(setup.work.scope.pulled(everything, round, whole=is_first))
    return pulled
