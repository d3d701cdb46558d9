"""One bit a number: its sign, and one magnitude for all.

EF-signSGD (Karimireddy et al., 2019, Error Feedback Fixes SignSGD, algorithm 1): the mean magnitude times the
sign, with the chain's error feedback. Where we differ: numbers that are exactly zero count as positive,
because there are only two signs to send, and a magnitude is that of a block instead of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.updates.transform import Encoded, Part, PayloadError, working_dtype

__all__ = ["Sign"]

_CHUNK = 1 << 16


class Sign(Component):
    """The signs of each tensor, and the mean magnitude of each block.

    What is lost has less squared norm than the tensor, unless that is zero.

    Args:
        block: numbers that share a magnitude.
        error_feedback: add what was lost to the next round's update. Without it, the sign is biased.
    """

    block: int = Field(default=4096, ge=8, multiple_of=8)
    error_feedback: bool = True

    def layout(self, spec: Part) -> dict[str, Part]:
        """Eight signs a byte, and a magnitude for each block."""
        return {
            "signs": Part((-(-spec.numel // 8),), torch.uint8),
            "scales": Part((-(-spec.numel // self.block),), working_dtype(spec.dtype)),
        }

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """Signs and mean magnitudes."""
        flat = tensor.detach().reshape(-1).to(working_dtype(tensor.dtype))
        whole = flat.numel() // self.block * self.block
        means = [_mean_magnitudes(flat[:whole].view(-1, self.block))]
        if whole < flat.numel():
            means.append(_mean_magnitudes(flat[whole:].view(1, -1)))
        signs = torch.from_numpy(np.packbits((flat >= 0).numpy()))
        return Encoded({"signs": signs, "scales": torch.cat(means)}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        """Magnitudes with their signs.

        Raises:
            PayloadError: a magnitude is negative.
        """
        scales = parts["scales"]
        if scales.numel() and float(scales.min()) < 0:
            raise PayloadError(f"a scale is {float(scales.min()):g}; scales are not negative")
        numbers = torch.empty(spec.numel, dtype=scales.dtype)
        step = max(1, _CHUNK // self.block) * self.block
        signs = parts["signs"].numpy()
        for start in range(0, spec.numel, step):
            stop = min(start + step, spec.numel)
            bits = torch.from_numpy(np.unpackbits(signs[start // 8 : -(-stop // 8)], count=stop - start))
            spread = scales[start // self.block : -(-stop // self.block)].repeat_interleave(self.block)
            numbers[start:stop] = bits.to(scales.dtype).mul_(2).sub_(1).mul_(spread[: stop - start])
        return numbers.view(spec.shape).to(spec.dtype)


def _mean_magnitudes(rows: torch.Tensor) -> torch.Tensor:
    sums: torch.Tensor = torch.linalg.vector_norm(rows, 1, dim=1)
    return sums.div_(rows.shape[1])
