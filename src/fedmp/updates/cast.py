"""Half the bytes: numbers rounded to the nearest 16-bit one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedmp.component import Component
from fedmp.errors import TrainingError
from fedmp.updates.transform import Encoded, Part, like

__all__ = ["BFloat16", "Float16"]


class BFloat16(Component):
    """bfloat16: float32's range with 8 bits of precision, so each number is off by at most 2**-8 of itself.

    Args:
        error_feedback: keep what rounding loses for the next round.
    """

    error_feedback: bool = False

    def layout(self, spec: Part) -> dict[str, Part]:
        """One tensor of half the bytes, or itself if it has only 16 bits already."""
        return _cast_layout(spec, torch.bfloat16)

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """Round."""
        return Encoded({"": tensor.to(torch.bfloat16)}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        """Widen."""
        return parts[""].to(spec.dtype)


class Float16(Component):
    """IEEE half precision: off by at most 2**-11 of a number or 2**-25, whichever is more, up to 65504.

    Args:
        error_feedback: keep what rounding loses for the next round.
    """

    error_feedback: bool = False

    def layout(self, spec: Part) -> dict[str, Part]:
        """One tensor of half the bytes, or itself if it has only 16 bits already."""
        return _cast_layout(spec, torch.float16)

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """Round.

        Raises:
            TrainingError: a number is beyond float16's range.
        """
        half = tensor.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise TrainingError(
                f"a number of {float(tensor.abs().max()):.4g} does not fit float16, whose largest is 65504; "
                f"use bf16, or clip the update first"
            )
        return Encoded({"": half}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        """Widen."""
        return parts[""].to(spec.dtype)


def _cast_layout(spec: Part, dtype: torch.dtype) -> dict[str, Part]:
    return {"": Part(spec.shape, dtype)} if spec.dtype.itemsize > dtype.itemsize else like(spec)
