"""Frames: what travels between two neighbouring stages, and buffers to put it in.

A frame is one contiguous block of bytes: a fixed header, then the tensors, each aligned. It says which
generation, round, step and micro-batch it belongs to and what it holds, so that a stale or foreign one
is an error and never a wrong number.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from fedmp.errors import FrameError
from fedmp.stages import ValueSpec

__all__ = ["BufferPool", "FrameKind", "FrameLayout", "FrameTag", "pack", "unpack"]

_MAGIC = 0x0FED_0001
_HEADER_WORDS = 8
_ALIGNMENT = 64


class FrameKind(IntEnum):
    """What a frame holds."""

    ACTIVATION = 1
    GRADIENT = 2
    TIED_GRADIENT = 3


@dataclass(frozen=True)
class FrameTag:
    """Where a frame belongs."""

    generation: int
    round: int
    step: int
    microbatch: int
    kind: FrameKind


class FrameLayout:
    """The tensors of a frame and where they lie in it.

    Args:
        shapes: of the tensors, in order.
        dtypes: of the tensors, in order.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
        self.entries: list[tuple[int, int, torch.dtype, tuple[int, ...]]] = []
        offset = _ALIGNMENT
        for shape, dtype in zip(shapes, dtypes, strict=True):
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            self.entries.append((offset, offset + num_bytes, dtype, tuple(shape)))
            offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = offset
        self.description = ", ".join(f"{dtype} {shape}" for _, _, dtype, shape in self.entries)
        self.digest = zlib.crc32(self.description.encode())

    @classmethod
    def of(cls, specs: Sequence[ValueSpec], batch_size: int) -> FrameLayout:
        """The layout of boundary tensors for a number of samples."""
        return cls([spec.shape(batch_size) for spec in specs], [spec.dtype for spec in specs])

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The tensors, as views into a frame's buffer."""
        return [buffer[start:stop].view(dtype).view(shape) for start, stop, dtype, shape in self.entries]


class BufferPool:
    """Reusable byte buffers on one device.

    Args:
        device: where the buffers live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, list[torch.Tensor]] = {}
        self.num_allocated = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer of exactly this size, with undefined content."""
        free = self._free.get(num_bytes)
        if free:
            return free.pop()
        self.num_allocated += 1
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Return a buffer that nobody reads or writes any more."""
        self._free.setdefault(buffer.numel(), []).append(buffer)


def pack(
    buffer: torch.Tensor, layout: FrameLayout, tag: FrameTag, tensors: Sequence[torch.Tensor | None]
) -> None:
    """Write a frame; None stands for zeros.

    Raises:
        FrameError: a tensor has not the shape that the plan was made for.
    """
    header = torch.tensor(
        [_MAGIC, tag.generation, tag.round, tag.step, tag.microbatch, tag.kind, layout.num_bytes, layout.digest]
    )
    buffer[: _HEADER_WORDS * 8].view(torch.int64).copy_(header)
    for view, tensor in zip(layout.views(buffer), tensors, strict=True):
        if tensor is None:
            view.zero_()
            continue
        if tensor.shape != view.shape:
            raise FrameError(
                f"{tag.kind.name.lower()} of micro-batch {tag.microbatch} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(view.shape)}; sizes other than the batch must be those of the example inputs"
            )
        view.copy_(tensor)


def unpack(buffer: torch.Tensor, layout: FrameLayout, tag: FrameTag) -> list[torch.Tensor]:
    """Check a frame against what must come now, and view its tensors.

    Raises:
        FrameError: it belongs elsewhere, or holds something else.
    """
    words = buffer[: _HEADER_WORDS * 8].view(torch.int64).tolist()
    wanted = [
        _MAGIC, tag.generation, tag.round, tag.step, tag.microbatch, tag.kind, layout.num_bytes, layout.digest
    ]  # fmt: skip
    if words != wanted:
        names = ("magic", "generation", "round", "step", "micro-batch", "kind", "size", "tensors")
        wrong = [
            f"{name} {got} instead of {want}"
            for name, got, want in zip(names, words, wanted, strict=True)
            if got != want
        ]
        raise FrameError(
            f"unexpected frame while waiting for the {tag.kind.name.lower()} of micro-batch "
            f"{tag.microbatch} ({layout.description}): {'; '.join(wrong)}"
        )
    return layout.views(buffer)
