"""Bodies of the federation plane: a payload and its report as bytes, and bytes as a payload.

A body is a safetensors file. It goes out as its header and then the very memory of its tensors, which are
neither copied nor held twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load

from fedmp.errors import FederationError
from fedmp.records import DeviceReport
from fedmp.updates import PayloadError, Zstd, decompress

__all__ = ["Body", "read_body", "stage_body", "update_body"]

_REPORT_BYTES = 512  # reports are filled up to a multiple, so that a body's length does not depend on digits
_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Body:
    """What a request or an answer carries.

    Attributes:
        pieces: its bytes, in order; memory of tensors, which must not change until it is sent.
        is_compressed: whether it has to be decompressed first.
    """

    pieces: tuple[bytes | memoryview, ...]
    is_compressed: bool = False

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return sum(map(len, self.pieces))

    def sha256(self) -> bytes:
        """Its digest."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(piece)
        return digest.digest()


def update_body(payload: Mapping[str, torch.Tensor], report: DeviceReport, zstd: Zstd | None = None) -> Body:
    """An update as it travels: a safetensors file with the report in its metadata.

    Args:
        payload: the transformed update.
        report: what goes with it.
        zstd: compresses the file, if that is worth it; None does not.
    """
    text = report.model_dump_json()
    text = text.ljust(-(-len(text) // _REPORT_BYTES) * _REPORT_BYTES)
    return _packed(_file(payload, {"report": text}), zstd)


def stage_body(payload: Mapping[str, torch.Tensor], zstd: Zstd | None = None) -> Body:
    """A global stage as it travels; arguments as `update_body` has them."""
    return _packed(_file(payload, None), zstd)


def read_body(body: bytes, *, is_compressed: bool, max_bytes: int) -> dict[str, torch.Tensor]:
    """The tensors of a global stage that came in.

    Raises:
        FederationError: it decompresses to more than `max_bytes`, or is not what it claims to be.
    """
    if is_compressed:
        try:
            body = b"".join(decompress([body], max_bytes=max_bytes))
        except PayloadError as error:
            raise FederationError(f"the coordinator's global stage cannot be read: {error}") from error
    return load(body)


def _file(payload: Mapping[str, torch.Tensor], metadata: dict[str, str] | None) -> Body:
    """A safetensors file: the length of the header, the header, filled up with spaces, and the tensors."""
    # widest numbers first, then by name, as safetensors has it: then each tensor is aligned
    order = sorted(payload, key=lambda name: (-payload[name].element_size(), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in order:
        tensor = payload[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    return Body((len(text).to_bytes(8, "little"), text, *(_memory(payload[name]) for name in order)))


def _memory(tensor: torch.Tensor) -> memoryview:
    numbers = tensor.detach().cpu().contiguous().reshape(-1)
    return numbers.view(torch.uint8).numpy().data


def _packed(body: Body, zstd: Zstd | None) -> Body:
    compressed = zstd.compress(b"".join(body.pieces)) if zstd is not None else None
    return body if compressed is None else Body((compressed,), is_compressed=True)
