"""Bodies of the federation plane: a payload and its report as bytes, and bytes as a payload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load, save

from fedmp.errors import FederationError
from fedmp.records import DeviceReport
from fedmp.updates import PayloadError, Zstd, decompress

__all__ = ["Body", "read_body", "stage_body", "update_body"]

_REPORT_BYTES = 512  # reports are filled up to a multiple, so that a body's length does not depend on digits


@dataclass(frozen=True)
class Body:
    """What a request or an answer carries.

    Attributes:
        content: its bytes, a safetensors file.
        is_compressed: whether it has to be decompressed first.
    """

    content: bytes
    is_compressed: bool = False


def update_body(payload: Mapping[str, torch.Tensor], report: DeviceReport, zstd: Zstd | None = None) -> Body:
    """An update as it travels: a safetensors file with the report in its metadata.

    Args:
        payload: the transformed update.
        report: what goes with it.
        zstd: compresses the file, if that is worth it; None does not.
    """
    text = report.model_dump_json()
    text = text.ljust(-(-len(text) // _REPORT_BYTES) * _REPORT_BYTES)
    return _packed(_save(payload, {"report": text}), zstd)


def stage_body(payload: Mapping[str, torch.Tensor], zstd: Zstd | None = None) -> Body:
    """A global stage as it travels; arguments as `update_body` has them."""
    return _packed(_save(payload, None), zstd)


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


def _save(payload: Mapping[str, torch.Tensor], metadata: dict[str, str] | None) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in payload.items()}, metadata)


def _packed(body: bytes, zstd: Zstd | None) -> Body:
    compressed = zstd.compress(body) if zstd is not None else None
    return Body(body) if compressed is None else Body(compressed, is_compressed=True)
