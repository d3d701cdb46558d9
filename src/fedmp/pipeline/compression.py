"""What tensors look like between two stages: as they are, in bfloat16, or in 8 bits with a scale a channel.

Compression loses precision on purpose: gradients are no longer those of one process. It is off unless
asked for, and must be the same on all of a client's devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

__all__ = ["BFloat16", "Codec", "Compression", "Int8PerChannel", "Plain", "WireTensor", "codec_for"]

Compression = Literal["none", "bf16", "int8"]
WireTensor = tuple[tuple[int, ...], torch.dtype]


class Codec(Protocol):
    """How one tensor is written into a frame."""

    def wire(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[WireTensor]:
        """Shapes and dtypes of the tensors that travel."""
        ...

    def encode(self, tensor: torch.Tensor, views: Sequence[torch.Tensor]) -> None:
        """Write a tensor into the frame's views."""
        ...

    def decode(self, views: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The tensor that a frame's views hold."""
        ...


class Plain:
    """The tensor itself, without a copy on arrival."""

    def wire(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[WireTensor]:
        """One tensor like the original."""
        return [(shape, dtype)]

    def encode(self, tensor: torch.Tensor, views: Sequence[torch.Tensor]) -> None:
        """Copy it."""
        views[0].copy_(tensor)

    def decode(self, views: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The frame's own memory."""
        return views[0]


class BFloat16:
    """Half the bytes of float32: its range, with 8 bits of precision."""

    def wire(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[WireTensor]:
        """One bfloat16 tensor."""
        return [(shape, torch.bfloat16)]

    def encode(self, tensor: torch.Tensor, views: Sequence[torch.Tensor]) -> None:
        """Round to bfloat16."""
        views[0].copy_(tensor)

    def decode(self, views: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Widen again."""
        return views[0].to(dtype)


class Int8PerChannel:
    """A quarter of the bytes of float32: 8 bits and one float32 scale a channel.

    A channel is an index of dimension 1 of images ([N, C, H, W]) and of the last dimension of all else.
    The scale is the channel's largest magnitude / 127, so nothing is clipped.
    """

    def wire(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[WireTensor]:
        """The 8-bit tensor and its scales."""
        return [(shape, torch.int8), ((shape[_channel_dim(len(shape))],), torch.float32)]

    def encode(self, tensor: torch.Tensor, views: Sequence[torch.Tensor]) -> None:
        """Quantize to the nearest step."""
        dim = _channel_dim(tensor.dim())
        others = [d for d in range(tensor.dim()) if d != dim]
        largest = tensor.abs().amax(others) if others else tensor.abs()
        scales = views[1].copy_(largest.div_(127.0)).clamp_(min=torch.finfo(torch.float32).tiny)
        views[0].copy_(
            tensor.div(_along(scales, tensor.dim(), dim).to(tensor.dtype)).round_().clamp_(-127, 127)
        )

    def decode(self, views: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Steps times scale."""
        dim = _channel_dim(views[0].dim())
        return views[0].to(dtype).mul_(_along(views[1], views[0].dim(), dim).to(dtype))


_PLAIN, _BFLOAT16, _INT8 = Plain(), BFloat16(), Int8PerChannel()


def codec_for(compression: Compression, shape: tuple[int, ...], dtype: torch.dtype) -> Codec:
    """How a tensor travels: only wide floating-point tensors are ever compressed.

    Raises:
        ValueError: an unknown kind of compression.
    """
    if compression not in ("none", "bf16", "int8"):
        raise ValueError(f"compression is 'none', 'bf16' or 'int8', not {compression!r}")
    wide = dtype in (torch.float32, torch.float64)
    if compression == "none" or not wide or not shape:
        return _PLAIN
    if compression == "bf16" or len(shape) < 2:
        return _BFLOAT16
    return _INT8


def _channel_dim(num_dims: int) -> int:
    return 1 if num_dims == 4 else num_dims - 1


def _along(scales: torch.Tensor, num_dims: int, dim: int) -> torch.Tensor:
    shape = [1] * num_dims
    shape[dim] = -1
    return scales.view(shape)
