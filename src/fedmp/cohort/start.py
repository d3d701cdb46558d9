"""What the clients of a round are handed out, as a cohort takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["RoundStart"]


@dataclass(frozen=True, eq=False)
class RoundStart:
    """The global model at the beginning of a round, and what goes with it.

    Attributes:
        parameters: [P] the trained ones, flat.
        statistics: buffers that training changes, by name.
        still: the model's other tensors, by name.
        received: [P] the server's slots alike, by slot.
    """

    parameters: torch.Tensor
    statistics: Mapping[str, torch.Tensor]
    still: Mapping[str, torch.Tensor] = field(default_factory=dict)
    received: Mapping[str, torch.Tensor] = field(default_factory=dict)
