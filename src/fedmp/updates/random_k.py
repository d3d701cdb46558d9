"""Numbers of an update drawn by lot: both sides draw the same, so only the numbers travel.

Random-k sparsification (Stich et al., 2018, section 2; Konečný et al., 2016, "random mask"). Where we
differ: the lot is stratified. A tensor is cut into k runs of equal length, to within one number, and one
number is drawn of each: the drawing takes no sorting, and is spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.updates.transform import Encoded, Part, generator

__all__ = ["RandomK"]


class RandomK(Component):
    """k numbers of each tensor, drawn anew each round.

    With error feedback a number is sent as it is, and what was not sent waits. Without, it is sent times the
    length of its run, which is unbiased, with a variance of about 1 / fraction.

    Args:
        fraction: of each tensor's numbers that are sent; at least one number.
        error_feedback: add what was not sent to the next round's update.
    """

    fraction: float = Field(default=0.01, gt=0, le=1)
    error_feedback: bool = True

    def layout(self, spec: Part) -> dict[str, Part]:
        """The numbers alone."""
        return {"values": Part((self._count(spec.numel),), spec.dtype)}

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """Draw."""
        flat = tensor.detach().reshape(-1)
        indices, lengths = _draw(self._count(flat.numel()), flat.numel(), seed)
        values = flat[indices]
        return Encoded({"values": values if self.error_feedback else values * lengths.to(values.dtype)}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        """Zeros but for what was drawn."""
        indices, _ = _draw(self._count(spec.numel), spec.numel, seed)
        flat = torch.zeros(spec.numel, dtype=spec.dtype)
        flat[indices] = parts["values"]
        return flat.view(spec.shape)

    def _count(self, size: int) -> int:
        return max(1, min(size, math.ceil(self.fraction * size - 1e-9)))


def _draw(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending indices, one of each run, and the runs' lengths."""
    starts = torch.arange(count + 1) * size // count
    lengths = starts.diff()
    drawn = torch.rand(count, dtype=torch.float64, generator=generator(seed)).mul_(lengths).long()
    return starts[:-1] + torch.minimum(drawn, lengths - 1), lengths
