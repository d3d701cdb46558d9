"""What a user of fedmp might write in modules of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedmp.partition import build_plan
from fedmp.records import Plan, Profile
from fedmp.topology import Device, Links


class FirstLayerAlone:
    """A partitioner: the first layer on the first device, all others on the second."""

    def plan(
        self, profile: Profile, devices: Sequence[Device], links: Links, *, num_microbatches: int
    ) -> Plan:
        return build_plan(
            profile,
            devices[:2],
            [1],
            links,
            num_microbatches=num_microbatches,
            partitioner="first-layer-alone",
        )


class Undecided(nn.Module):
    """A model whose forward depends on values, which no graph can hold."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.inner = Branching()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(1))  # type: ignore[no-any-return]


class Branching(nn.Module):
    """Takes one of two ways, whichever its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(784, 10)
        self.right = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) if float(x.detach().sum()) > 0 else self.right(x)  # type: ignore[no-any-return]
