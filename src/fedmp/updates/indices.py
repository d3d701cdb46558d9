"""Which of a tensor's numbers are meant: ascending indices, in about one byte each.

Three codes, chosen by how dense the indices are, so that both sides agree without a word. A bitmap takes a
bit for every number. Otherwise gaps between neighbours are written in digits of one or two bytes; the
largest digit means "add this much and go on", so a gap of any length can be told.
"""

from __future__ import annotations

import numpy as np
import torch

from fedmp.updates.transform import Part, PayloadError

__all__ = ["decode_indices", "encode_indices", "indices_part"]

_BITMAP_ABOVE = 1 / 8  # a bit a number is less than a byte an index
_BYTES_ABOVE = 1 / 340  # gaps of 340 take two digits of one byte on average


def indices_part(count: int, size: int) -> Part:
    """What `count` indices below `size` become."""
    width = _width(count, size)
    if width == 0:
        return Part((-(-size // 8),), torch.uint8)
    longest = count + (size - count) // (256**width - 1)
    return Part((longest * width,), torch.uint8, is_bound=True)


def encode_indices(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Write indices.

    Args:
        indices: ascending, int64, from 0 to below `size`.
        size: of the tensor that they point into.
    """
    width = _width(indices.numel(), size)
    if width == 0:
        bits = np.zeros(size, dtype=np.bool_)
        bits[indices.numpy()] = True
        return torch.from_numpy(np.packbits(bits))
    gaps = np.diff(indices.numpy(), prepend=-1) - 1
    largest = 256**width - 1
    pauses, rest = np.divmod(gaps, largest)
    dtype = f"<u{width}"
    if pauses.any():
        ends = np.cumsum(pauses + 1) - 1
        digits = np.full(ends[-1] + 1, largest, dtype=dtype)
        digits[ends] = rest
    else:
        digits = rest.astype(dtype)
    return torch.from_numpy(digits.view(np.uint8))


def decode_indices(coded: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """Read what `encode_indices` wrote, by whomever.

    Raises:
        PayloadError: it is not `count` indices below `size`.
    """
    width = _width(count, size)
    if width == 0:
        bits = np.unpackbits(coded.numpy())
        found = np.flatnonzero(bits)
        last = found[-1] if len(found) else -1
    else:
        if coded.numel() % width:
            raise PayloadError(f"indices of {width} bytes each do not take {coded.numel()} bytes")
        digits = coded.numpy().view(f"<u{width}")
        is_end = digits != 256**width - 1
        if len(digits) and not is_end[-1]:
            raise PayloadError("the last index breaks off")
        found = np.cumsum(digits.astype(np.int64) + is_end)[is_end] - 1
        last = found[-1] if len(found) else -1
    if len(found) != count:
        raise PayloadError(f"there are {len(found)} indices; there must be {count}")
    if last >= size:
        raise PayloadError(f"an index is {last}, beyond the end of a tensor of {size} numbers")
    return torch.from_numpy(found)


def _width(count: int, size: int) -> int:
    """Bytes a digit; 0 for a bitmap."""
    if count >= size * _BITMAP_ABOVE:
        return 0
    return 1 if count >= size * _BYTES_ABOVE else 2
