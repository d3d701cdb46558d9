"""The largest numbers of an update and where they are; the rest waits for a later round.

Sparsified SGD with memory (Stich et al., 2018, algorithm 1; Aji and Heafield, 2017). The memory is the chain's
error feedback, or `EF21` before it. Where we differ: k is a share of each tensor, not of the model, so that what is
sent does not depend on how the model is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.updates.indices import decode_indices, encode_indices, indices_part
from fedmp.updates.transform import Encoded, Part

__all__ = ["TopK", "largest"]

_SORTED_UP_TO = 1 << 14
_SAMPLES = 1 << 13
_MARGIN = 4.0  # standard deviations of the sample's count


class TopK(Component):
    """The k largest magnitudes of each tensor.

    What is lost has at most (1 - fraction) of the tensor's squared norm.

    Args:
        fraction: of each tensor's numbers that are sent; at least one number.
        error_feedback: add what was not sent to the next round's update. Without it, small numbers are
            never sent at all.
    """

    fraction: float = Field(default=0.01, gt=0, le=1)
    error_feedback: bool = True

    def layout(self, spec: Part) -> dict[str, Part]:
        """The numbers, and their places."""
        count = self._count(spec.numel)
        return {"values": Part((count,), spec.dtype), "places": indices_part(count, spec.numel)}

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """Pick the largest."""
        flat = tensor.detach().reshape(-1)
        indices = largest(flat, self._count(flat.numel()))
        return Encoded({"values": flat[indices], "places": encode_indices(indices, flat.numel())}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        """Zeros but for what was sent.

        Raises:
            PayloadError: a place is beyond the tensor's end, or there are too many or too few.
        """
        indices = decode_indices(parts["places"], self._count(spec.numel), spec.numel)
        flat = torch.zeros(spec.numel, dtype=spec.dtype)
        flat[indices] = parts["values"]
        return flat.view(spec.shape)

    def _count(self, size: int) -> int:
        return max(1, min(size, math.ceil(self.fraction * size - 1e-9)))


def largest(flat: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices of the `count` largest magnitudes.

    Exact. Selecting among all numbers is slow, so a sample tells two thresholds, one that fewer than `count`
    numbers reach and one that more do, and only the numbers between them are sorted.
    """
    magnitudes = flat.abs()
    size = flat.numel()
    if size <= _SORTED_UP_TO:
        return _select(magnitudes, count)
    sample = magnitudes[:: size // _SAMPLES].sort(descending=True).values
    share = count / size * sample.numel()
    margin = math.ceil(_MARGIN * math.sqrt(min(share, sample.numel() - share)) + _MARGIN)
    high = sample[max(0, int(share) - margin)]
    rank = int(share) + margin
    while rank < sample.numel():
        candidates = torch.nonzero(magnitudes >= sample[rank]).view(-1)
        if candidates.numel() >= count:
            return _narrow(magnitudes, candidates, high, count)
        rank += margin
        margin *= 2  # the sample was not like the rest: regular patterns
    return _select(magnitudes, count)


def _narrow(
    magnitudes: torch.Tensor, candidates: torch.Tensor, high: torch.Tensor, count: int
) -> torch.Tensor:
    """The `count` largest of the candidates, of which those above `high` are among them if not too many."""
    values = magnitudes[candidates]
    is_chosen = values > high
    missing = count - int(is_chosen.sum())
    if missing < 0:
        return candidates[_select(values, count)]
    between = torch.nonzero(~is_chosen).view(-1)
    is_chosen[between[_select(values[between], missing)]] = True
    return candidates[is_chosen]


def _select(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    return torch.topk(magnitudes, count, sorted=False).indices.sort().values
