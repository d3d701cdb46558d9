"""How a device runs its stages: what to trade for memory, bytes or speed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from fedmp.pipeline.compression import Compression

__all__ = ["Pace", "RunnerOptions"]


@dataclass(frozen=True)
class Pace:
    """How long a device's actions take at least; it sleeps for the rest.

    Attributes:
        forward_s, backward_s: seconds of one micro-batch; halves of a split backward take half each.
    """

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class RunnerOptions:
    """Choices for a runner; all but `checkpoint` and `pace` must be the same on all of a client's devices.

    Attributes:
        checkpoint: keep only a stage's inputs until the backward, and compute its activations again: for
            all stages, none, or those of these numbers.
        autocast: compute in this dtype where torch thinks it safe; None computes in the weights' dtype.
            Tensors cross a boundary in the dtype they were traced with, and are no less precise for it.
        pace: emulate a slower device: each forward and each backward takes at least so long; by stage, where they
            differ.
        compress_activations, compress_gradients: what crosses a boundary: "none", "bf16" or "int8".
    """

    checkpoint: bool | Collection[int] = False
    autocast: torch.dtype | None = None
    pace: Pace | Mapping[int, Pace] | None = None
    compress_activations: Compression = "none"
    compress_gradients: Compression = "none"

    def checkpoints(self, stage: int) -> bool:
        """Whether this stage's activations are computed again."""
        return self.checkpoint if isinstance(self.checkpoint, bool) else stage in self.checkpoint
