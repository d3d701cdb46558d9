"""Frames: what travels between two neighbouring stages, and the buffers that hold it.

A frame is one contiguous block of bytes: a fixed header, then the tensors, each aligned. It says which
generation, round, step and micro-batch it belongs to and what it holds, so that a stale or foreign one
is an error and never a wrong number.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from fedmp.errors import FrameError
from fedmp.pipeline.compression import Codec, Compression, Plain, codec_for
from fedmp.stages import ValueSpec

__all__ = ["Frame", "FrameKind", "FrameLayout", "FrameTag", "message_tag"]

_MAGIC = 0x0FED_0002
_HEADER = struct.Struct("=8q")
_HEADER_NAMES = ("magic", "generation", "round", "step", "micro-batch", "kind", "size", "tensors")
_ALIGNMENT = 64


class FrameKind(IntEnum):
    """What a frame holds."""

    ACTIVATION = 1
    GRADIENT = 2
    TIED_GRADIENT = 3
    NORM = 4
    OUTPUT_DESCRIPTION = 5
    OUTPUT = 6


class FrameTag(NamedTuple):
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
        compression: how wide floating-point tensors travel.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[torch.dtype],
        compression: Compression = "none",
    ) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.dtypes = list(dtypes)
        self.codecs = [codec_for(compression, *pair) for pair in zip(self.shapes, self.dtypes, strict=True)]
        self.is_plain = all(isinstance(codec, Plain) for codec in self.codecs)
        self.entries: list[tuple[int, torch.dtype, tuple[int, ...]]] = []
        self.parts: list[tuple[Codec, int, int]] = []
        offset = _ALIGNMENT
        for codec, shape, dtype in zip(self.codecs, self.shapes, self.dtypes, strict=True):
            first = len(self.entries)
            for wire_shape, wire_dtype in codec.wire(shape, dtype):
                self.entries.append((offset, wire_dtype, wire_shape))
                num_bytes = torch.Size(wire_shape).numel() * wire_dtype.itemsize
                offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            self.parts.append((codec, first, len(self.entries)))
        self.num_bytes = offset
        self.description = ", ".join(f"{dtype} {shape}" for _, dtype, shape in self.entries)
        self.digest = zlib.crc32(self.description.encode())

    @classmethod
    def of(
        cls, specs: Sequence[ValueSpec], batch_size: int, compression: Compression = "none"
    ) -> FrameLayout:
        """The layout of boundary tensors for a number of samples."""
        return cls([spec.shape(batch_size) for spec in specs], [spec.dtype for spec in specs], compression)


class Frame:
    """A buffer with the layout of its tensors, used again and again.

    Args:
        layout: of the tensors.
        device: where the buffer lives.
    """

    __slots__ = ("_header", "_views", "buffer", "layout", "tensors")

    def __init__(self, layout: FrameLayout, device: torch.device) -> None:
        self.layout = layout
        self.buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        bytes_of: Any = self.buffer.numpy() if device.type == "cpu" else None
        self._header = None if bytes_of is None else memoryview(bytes_of).cast("B")
        storage = self.buffer.untyped_storage()
        # not views of the buffer: each must be an autograd leaf with a version counter of its own
        self._views = [
            torch.empty(0, dtype=dtype, device=device).set_(
                storage, start // dtype.itemsize, torch.Size(shape), _strides(shape)
            )
            for start, dtype, shape in layout.entries
        ]
        self.tensors: list[torch.Tensor] = self._views

    def pack(self, tag: FrameTag, tensors: Sequence[torch.Tensor | None]) -> None:
        """Write a header and tensors; None stands for zeros.

        Raises:
            FrameError: a tensor has not the shape that the plan was made for.
        """
        layout = self.layout
        self._write_header(tag)
        for (codec, first, stop), shape, tensor in zip(layout.parts, layout.shapes, tensors, strict=True):
            if tensor is None:
                for view in self._views[first:stop]:
                    view.zero_()
            elif tensor.shape != shape:
                raise FrameError(
                    f"{tag.kind.name.lower()} of micro-batch {tag.microbatch} has shape {tuple(tensor.shape)}, "
                    f"expected {shape}; sizes other than the batch must be those of the example inputs"
                )
            elif layout.is_plain:
                self._views[first].copy_(tensor)
            else:
                codec.encode(tensor, self._views[first:stop])

    def unpack(self, tag: FrameTag) -> list[torch.Tensor]:
        """Check a received frame against what must come now, and give its tensors.

        Raises:
            FrameError: it belongs elsewhere, or holds something else.
        """
        wanted = self._words(tag)
        if self._header is not None:
            if self._header[: _HEADER.size] != _HEADER.pack(*wanted):
                raise _unexpected(tag, self.layout, _HEADER.unpack_from(self._header), wanted)
        else:
            words = tuple(self.buffer[: _HEADER.size].view(torch.int64).tolist())
            if words != wanted:
                raise _unexpected(tag, self.layout, words, wanted)
        if not self.layout.is_plain:
            self.tensors = [
                codec.decode(self._views[first:stop], dtype)
                for (codec, first, stop), dtype in zip(self.layout.parts, self.layout.dtypes, strict=True)
            ]
        return self.tensors

    def clear(self) -> None:
        """Forget the gradients of the last use, and decoded copies."""
        if self.tensors is self._views:
            for tensor in self._views:
                tensor.grad = None
        else:
            self.tensors = []

    def _write_header(self, tag: FrameTag) -> None:
        if self._header is not None:
            _HEADER.pack_into(self._header, 0, *self._words(tag))
        else:
            self.buffer[: _HEADER.size].view(torch.int64).copy_(torch.tensor(self._words(tag)))

    def _words(self, tag: FrameTag) -> tuple[int, ...]:
        return (_MAGIC, *tag, self.layout.num_bytes, self.layout.digest)


def message_tag(kind: FrameKind, stage: int, number: int, num_bytes: int) -> int:
    """The transport's tag of a message, at most 31 bits.

    The size takes part, because gloo ends the process when a message is larger than the buffer that waits
    for it: messages of another size must never meet that buffer.

    Args:
        kind: what it holds.
        stage: the stage that it comes from.
        number: its micro-batch.
        num_bytes: its size.
    """
    digest = (num_bytes // _ALIGNMENT * 0x9E37_79B1 >> 8) & 0x3FF
    return ((int(kind) & 7) << 28) | ((stage & 0xFF) << 20) | ((number & 0x3FF) << 10) | digest


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _unexpected(
    tag: FrameTag, layout: FrameLayout, words: Sequence[int], wanted: Sequence[int]
) -> FrameError:
    wrong = [
        f"{name} {got} instead of {want}"
        for name, got, want in zip(_HEADER_NAMES, words, wanted, strict=True)
        if got != want
    ]
    return FrameError(
        f"unexpected frame while waiting for the {tag.kind.name.lower()} of micro-batch "
        f"{tag.microbatch} ({layout.description}): {'; '.join(wrong)}"
    )
