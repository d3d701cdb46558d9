"""Numbers as a few levels between the largest and its negative, rounded up or down by chance.

QSGD (Alistarh et al., 2017, Communication-Efficient SGD via Gradient Quantization and Encoding, section 3.1),
with buckets of their section 4. Where we differ: a bucket is scaled by its largest magnitude, not by
its 2-norm, as their experiments do, and levels are packed into a fixed number of bits instead of Elias codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.updates.transform import Encoded, Part, PayloadError, generator, working_dtype

__all__ = ["Int4", "Int8"]

_CHUNK = 1 << 16  # numbers at a time: intermediate results stay in the cache
_LIFT = 2.0**64  # brings subnormal numbers among the others


class Int8(Component):
    """Eight bits a number and one scale a block: 127 levels on either side of zero.

    Unbiased, up to 2**-17 of a level. Each number is off by less than one level, which is the largest
    magnitude of its block / 127.

    Args:
        block: numbers that share a scale.
        error_feedback: keep what rounding loses for the next round; not needed for being unbiased.
    """

    block: int = Field(default=1024, ge=8, multiple_of=8)
    error_feedback: bool = False

    _levels: ClassVar[int] = 127

    def layout(self, spec: Part) -> dict[str, Part]:
        """The levels, whole blocks of them, and a scale for each block."""
        blocks = -(-spec.numel // self.block)
        return {
            "levels": Part((spec.numel,), torch.int8),
            "scales": Part((blocks,), working_dtype(spec.dtype)),
        }

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """Scale and round."""
        levels, scales = _round(tensor, self.block, self._levels, seed)
        return Encoded({"levels": levels, "scales": scales}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        """Levels times scale.

        Raises:
            PayloadError: a scale is negative, or a level is -128.
        """
        levels = parts["levels"]
        if levels.numel() and int(levels.min()) < -self._levels:
            raise PayloadError("a level is -128; they go from -127 to 127")
        return _unround(levels, parts["scales"], self.block, spec)


class Int4(Component):
    """Four bits a number and one scale a block: 7 levels on either side of zero.

    Unbiased, up to 2**-17 of a level. Each number is off by less than one level, which is the largest
    magnitude of its block / 7.

    Args:
        block: numbers that share a scale.
        error_feedback: keep what rounding loses for the next round; not needed for being unbiased.
    """

    block: int = Field(default=256, ge=8, multiple_of=8)
    error_feedback: bool = False

    _levels: ClassVar[int] = 7

    def layout(self, spec: Part) -> dict[str, Part]:
        """Two levels a byte, and a scale for each block."""
        blocks = -(-spec.numel // self.block)
        return {
            "levels": Part((-(-spec.numel // 2),), torch.uint8),
            "scales": Part((blocks,), working_dtype(spec.dtype)),
        }

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """Scale, round, pack."""
        levels, scales = _round(tensor, self.block, self._levels, seed)
        return Encoded({"levels": _pack(levels), "scales": scales}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        """Levels times scale.

        Raises:
            PayloadError: a scale is negative, or a level is -8, or the odd last half byte is not empty.
        """
        levels = _unpack(parts["levels"])
        if levels.numel() and int(levels.min()) < -self._levels:
            raise PayloadError("a level is -8; they go from -7 to 7")
        if levels.numel() > spec.numel and int(levels[-1]) != 0:
            raise PayloadError(f"there is a level after the last of {spec.numel} numbers")
        return _unround(levels[: spec.numel], parts["scales"], self.block, spec)


def _round(tensor: torch.Tensor, block: int, levels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels from -`levels` to `levels` of each number, and the blocks' scales."""
    flat = tensor.detach().reshape(-1).to(working_dtype(tensor.dtype))
    random = generator(seed)
    rounded = torch.empty(flat.numel(), dtype=torch.int8)
    scales = torch.empty(-(-flat.numel() // block), dtype=flat.dtype)
    step = max(1, _CHUNK // block) * block
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        stop = start + piece.numel()
        rows = _as_rows(piece, block)
        scale = rows.abs().amax(1).div_(levels)
        scales[start // block : start // block + len(scale)] = scale
        # 16 random bits a number: a quarter of the time that floats from the generator take
        chance = torch.empty(-(-rows.numel() // 4), dtype=torch.int64).random_(
            -(2**63), None, generator=random
        )
        noise = chance.view(torch.int16)[: rows.numel()].view(rows.shape)
        is_tiny = (scale > 0) & (scale < torch.finfo(scale.dtype).tiny)
        if bool(is_tiny.any()):  # the reciprocal of a subnormal overflows
            lift = torch.where(is_tiny, _LIFT, 1.0).to(scale.dtype)
            rows, scale = rows * lift[:, None], scale * lift
        inverse = scale.reciprocal().masked_fill_(scale == 0, 0.0)
        drawn = noise.to(flat.dtype).add_(0.5).mul_(2.0**-16).add_(0.5)  # uniform, between 0 and 1
        drawn.addcmul_(rows, inverse[:, None]).floor_().clamp_(-levels, levels)
        rounded[start:stop] = drawn.reshape(-1)[: piece.numel()]
    return rounded, scales


def _unround(levels: torch.Tensor, scales: torch.Tensor, block: int, spec: Part) -> torch.Tensor:
    if scales.numel() and float(scales.min()) < 0:
        raise PayloadError(f"a scale is {float(scales.min()):g}; scales are not negative")
    numbers = torch.empty(spec.numel, dtype=scales.dtype)
    step = max(1, _CHUNK // block) * block
    for start in range(0, spec.numel, step):
        piece = levels[start : min(start + step, spec.numel)]
        rows = _as_rows(piece, block)
        scale = scales[start // block : start // block + len(rows)]
        numbers[start : start + piece.numel()] = (rows * scale[:, None]).reshape(-1)[: piece.numel()]
    return numbers.view(spec.shape).to(spec.dtype)


def _as_rows(piece: torch.Tensor, block: int) -> torch.Tensor:
    """One block a row, the last one filled with zeros."""
    missing = -piece.numel() % block
    if missing:
        piece = torch.nn.functional.pad(piece, (0, missing))
    return piece.view(-1, block)


def _pack(levels: torch.Tensor) -> torch.Tensor:
    """Two levels a byte, the first in the lower half."""
    if levels.numel() % 2:
        levels = torch.cat([levels, levels.new_zeros(1)])
    pairs = levels.view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    levels = torch.empty((packed.numel(), 2), dtype=torch.int8)
    signed = packed.view(torch.int8)
    levels[:, 0] = (signed << 4) >> 4  # shifts of signed numbers keep the sign
    levels[:, 1] = signed >> 4
    return levels.view(-1)
