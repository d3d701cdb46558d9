"""Entropy coding of a whole body, both ways, as HTTP's content-encoding `zstd` (RFC 8878).

A peer may send anything, so nothing is ever decompressed beyond the length that its layout allows: a small
body that would fill the disk is refused after that many bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import zstandard
from pydantic import Field

from fedmp.component import Component
from fedmp.updates.transform import PayloadError

__all__ = ["CONTENT_ENCODING", "Zstd", "decompress"]

CONTENT_ENCODING = "zstd"

_WORTH_IT = 0.98  # of the body's length: less saving is not worth the other side's time
_LARGEST_WINDOW = 1 << 23  # that RFC 8878 asks every decoder to have; a frame may ask for no more memory
_LONGEST_HEAD = 18  # RFC 8878, section 3.1.1
_INPUT_BYTES = 512  # at once: each three may stand for 128 KiB, which must be had at once, too


class Zstd(Component):
    """Compress each body with Zstandard, if that makes it at least 2 % shorter. Comes last of all transforms.

    Args:
        level: from 1, the fastest, to 19.
    """

    level: int = Field(default=3, ge=1, le=19)

    def compress(self, body: bytes) -> bytes | None:
        """The compressed body; None if it is not worth it."""
        compressor = zstandard.ZstdCompressor(level=self.level, write_checksum=False)
        compressed = compressor.compress(body)
        return compressed if len(compressed) < _WORTH_IT * len(body) else None


def decompress(pieces: Iterable[bytes], *, max_bytes: int) -> Iterator[bytes]:
    """Undo `Zstd`, a piece at a time.

    Args:
        pieces: of the compressed body; one frame, which announces its length.
        max_bytes: that the body may have.

    Raises:
        PayloadError: it has more, is not such a frame, or breaks off.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
    head = b""
    num_bytes = 0
    for piece in pieces:
        if len(head) < _LONGEST_HEAD:
            head += piece[:_LONGEST_HEAD]
            if len(head) >= _LONGEST_HEAD:
                _check_head(head, max_bytes)
        for start in range(0, len(piece), _INPUT_BYTES):
            if decompressor.eof:
                raise PayloadError("there are bytes after the end of the zstd frame")
            try:
                out = decompressor.decompress(piece[start : start + _INPUT_BYTES])
            except zstandard.ZstdError as error:
                raise PayloadError(f"the body is not compressed by zstd: {error}") from error
            num_bytes += len(out)
            if num_bytes > max_bytes:
                raise PayloadError(f"the body decompresses to more than {max_bytes} bytes", "too-long")
            if out:
                yield out
    if not decompressor.eof or decompressor.unused_data:
        what = "has bytes after it" if decompressor.eof else "breaks off"
        raise PayloadError(f"the zstd frame {what} after {num_bytes} bytes of its content")


def _check_head(head: bytes, max_bytes: int) -> None:
    try:
        announced = zstandard.frame_content_size(head)
    except zstandard.ZstdError as error:
        raise PayloadError(f"the body is not compressed by zstd: {error}") from error
    if announced < 0:
        raise PayloadError("the zstd frame does not announce the length of its content")
    if announced > max_bytes:
        raise PayloadError(
            f"the body decompresses to {announced} bytes, at most {max_bytes} are allowed", "too-long"
        )
