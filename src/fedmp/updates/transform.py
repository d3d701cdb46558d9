"""The seam of update transforms: what a tensor becomes for the wire, and how it is had back.

A transform sees one trained tensor at a time. So what a client sends does not depend on how its plan cuts
the model, simulated clients send what real ones do, and the coordinator undoes a tensor when its aggregator
asks for it. `layout` tells, from the tensor's spec alone, what `encode` makes of it: by that the
coordinator checks what arrives before it acknowledges it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

__all__ = [
    "Encoded",
    "Part",
    "PayloadError",
    "UpdateTransform",
    "generator",
    "is_finite",
    "like",
    "working_dtype",
]


class PayloadError(ValueError):
    """A payload that no encoder makes: its numbers contradict each other or its layout.

    Attributes:
        reason: one word for it, for logs and counts.
    """

    def __init__(self, message: str, reason: str = "malformed-payload") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Part:
    """What a tensor looks like on the wire.

    Attributes:
        shape, dtype: of it.
        is_bound: the shape is that of the longest that there may be, in its one dimension.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_bound: bool = False

    @property
    def numel(self) -> int:
        """Its numbers; the most that there may be if the length varies."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Its bytes; the most that there may be if the length varies."""
        return self.numel * self.dtype.itemsize

    def explain(self, tensor: torch.Tensor) -> str:
        """What is wrong with a tensor that should look so; empty if nothing is."""
        shape = tuple(tensor.shape)
        fits = shape == self.shape
        if self.is_bound:
            fits = len(shape) == 1 and shape[0] <= self.shape[0]
        if fits and tensor.dtype == self.dtype:
            return ""
        most = "at most " if self.is_bound else ""
        return f"must be {self.dtype} {most}{self.shape}, not {tensor.dtype} {shape}"


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a transform makes of a tensor.

    Attributes:
        parts: by name, as `layout` has them.
        state: what the transform wants to see again when it encodes the same tensor next.
    """

    parts: Mapping[str, torch.Tensor]
    state: Mapping[str, torch.Tensor]


@runtime_checkable
class UpdateTransform(Protocol):
    """A way to write a tensor in fewer bytes, or otherwise than it is.

    Transforms are frozen and picklable, and keep nothing between calls. `fedmp.updates.contract` has the
    tests that each must pass.
    """

    @property
    def error_feedback(self) -> bool:
        """Whether what was lost shall be added to the tensor when it is encoded next."""
        ...

    def layout(self, spec: Part) -> Mapping[str, Part]:
        """The parts that a floating-point tensor becomes; `{"": spec}` for one that is left as it is.

        Args:
            spec: of the tensor; its length never varies.
        """
        ...

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """The parts of a tensor whose layout is not itself.

        Args:
            tensor: finite; not changed.
            state: as the last call for this tensor returned it; empty at first.
            seed: of every random choice.
        """
        ...

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        """The tensor that the parts tell of, as near as they do.

        Args:
            parts: finite, with shapes and dtypes of the layout; whatever else a peer may have written.
            spec: of the tensor.
            seed: that it was encoded with.

        Raises:
            PayloadError: the numbers make no sense, such as an index beyond the tensor's end.
        """
        ...


def generator(seed: int) -> torch.Generator:
    """Random numbers of a seed."""
    return torch.Generator().manual_seed(seed)


def like(spec: Part) -> dict[str, Part]:
    """The layout of a tensor that is left as it is."""
    return {"": spec}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether none of a floating-point tensor's numbers is NaN or infinite; reads it once, and copies nothing."""
    if tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # torch does not compare eighths of a float64
        tensor = tensor.float()
    return bool(
        torch.isfinite(torch.stack(torch.aminmax(tensor))).all()
    )  # NaN is both the least and the largest


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to compute in: halves have too few bits for sums, and double keeps its precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32
