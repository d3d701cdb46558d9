"""A data set in memory: what sources return, splits cut up, and devices draw their batches from.

Samples stay in their compact published form (uint8 images, float16 signals) until `batch` turns the rows
it is asked for into what a model takes.

Shape letters: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch

from fedmp.errors import DataError

__all__ = ["DataSource", "Dataset", "TrainTest"]

_MAX_IMAGE_CHANNELS = 4


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Samples with their targets.

    A device of the first stage needs only inputs and one of the last only targets, so either may be
    None, but not both.

    Args:
        inputs: [N, ...]. uint8 means images, raw 0..255, as [N,H,W] or [N,H,W,C] with at most 4
            channels; other integers are token sequences; floats are features or signals, channels
            in dim 1.
        targets: [N, ...]. Whole numbers are classes (one a sample, or one a position), floats are
            values to predict.
        users: [N] whole numbers, the person or role that each sample comes from; None if unknown.
        mean, std: per channel, applied by `batch` (to images after scaling to 0..1); empty for none.
        label_names: names of the classes in label order; may be empty.

    Raises:
        DataError: lengths disagree, nothing is held, or the normalisation does not fit the inputs.

    Example:
        >>> data = Dataset(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]))
        >>> x, y = data.batch([0, 2])
        >>> tuple(x.shape), x.dtype, y.tolist()
        ((2, 1, 8, 8), torch.float32, [0, 1])
    """

    inputs: torch.Tensor | None
    targets: torch.Tensor | None
    users: torch.Tensor | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        held = {"inputs": self.inputs, "targets": self.targets, "users": self.users}
        lengths = {name: len(rows) for name, rows in held.items() if rows is not None}
        if self.inputs is None and self.targets is None:
            raise DataError("a data set needs inputs or targets, but both are None")
        if len(set(lengths.values())) > 1:
            raise DataError(
                "every sample needs one row in each, but there are "
                + ", ".join(f"{count} {name}" for name, count in lengths.items())
            )
        if self.inputs is not None:
            _check_inputs(self.inputs, self.mean)
        if len(self.mean) != len(self.std):
            raise DataError(f"mean has {len(self.mean)} channels but std has {len(self.std)}")
        if not all(math.isfinite(value) for value in self.mean):
            raise DataError(f"mean is {self.mean}; every channel's must be finite")
        if not all(value > 0 and math.isfinite(value) for value in self.std):
            raise DataError(f"std is {self.std}; every channel's must be positive")

    def __repr__(self) -> str:
        held = {"inputs": self.inputs, "targets": self.targets, "users": self.users}
        shapes = ", ".join(
            f"{name}={'None' if rows is None else f'{list(rows.shape)} {rows.dtype}'}"
            for name, rows in held.items()
        )
        return f"Dataset({shapes}, labels={len(self.label_names)})"

    def __len__(self) -> int:
        """Number of samples."""
        rows = self.inputs if self.inputs is not None else self.targets
        assert rows is not None
        return len(rows)

    @cached_property
    def _channels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, [C], made once: so that what reads them reads the same tensors each time."""
        assert self.inputs is not None
        dtype = torch.float64 if self.inputs.dtype == torch.float64 else torch.float32
        return torch.tensor(self.mean, dtype=dtype), torch.tensor(self.std, dtype=dtype)

    @property
    def num_classes(self) -> int:
        """Number of classes: of `label_names` if there are any, else the largest target plus one.

        It is 0 where targets are not whole numbers.

        Raises:
            DataError: there are neither label names nor targets to tell it from.
        """
        if self.label_names:
            return len(self.label_names)
        if self.targets is None:
            raise DataError(
                "the number of classes is unknown: the data set has no targets and no label_names"
            )
        if self.targets.is_floating_point() or len(self.targets) == 0:
            return 0
        return int(self.targets.max()) + 1

    def select(self, indices: torch.Tensor | Sequence[int]) -> Dataset:
        """The given rows, in the given order, as a data set that owns a copy of just those rows.

        Args:
            indices: row numbers from 0 to N-1; repeats are allowed.

        Raises:
            IndexError: a row number is out of range.
            ValueError: `indices` is a mask instead of row numbers.
        """
        rows = _as_indices(indices)
        return replace(
            self,
            inputs=None if self.inputs is None else self.inputs.index_select(0, rows),
            targets=None if self.targets is None else self.targets.index_select(0, rows),
            users=None if self.users is None else self.users.index_select(0, rows),
        )

    def without_inputs(self) -> Dataset:
        """The same samples without their inputs, for a device that computes only the loss.

        Raises:
            DataError: there are no targets either.
        """
        return replace(self, inputs=None)

    def without_targets(self) -> Dataset:
        """The same samples without their targets, for a device that only feeds the model.

        Raises:
            DataError: there are no inputs either.
        """
        return replace(self, targets=None)

    def batch(self, indices: torch.Tensor | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the given rows, ready for a model; see the two methods below."""
        return self.input_batch(indices), self.target_batch(indices)

    def input_batch(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Inputs of the given rows, ready for a model.

        Returns:
            Images as float32 [B,C,H,W], scaled to 0..1; float16 and bfloat16 as float32; other floats
            as they are; whole numbers as int64. With `mean` and `std`, normalised along dim 1.

        Raises:
            DataError: this data set holds no inputs.
            IndexError, ValueError: as for `select`.
        """
        if self.inputs is None:
            raise DataError("this data set holds no inputs: it was made for a device that needs only targets")
        rows = self.inputs.index_select(0, _as_indices(indices))
        ready = _image_batch(rows) if rows.dtype == torch.uint8 else _widened(rows)
        if not self.mean:
            return ready
        mean, std = self._channels
        trailing = [1] * (ready.dim() - 2)
        return (ready - mean.view(1, -1, *trailing)).div_(std.view(1, -1, *trailing))

    def target_batch(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Targets of the given rows: int64 for classes, floating point for values.

        Raises:
            DataError: this data set holds no targets.
            IndexError, ValueError: as for `select`.
        """
        if self.targets is None:
            raise DataError("this data set holds no targets: it was made for a device that needs only inputs")
        return _widened(self.targets.index_select(0, _as_indices(indices)))


@dataclass(frozen=True, eq=False)
class TrainTest:
    """What a source returns.

    Args:
        train: samples that a split spreads over the clients.
        test: held-out samples, for measuring the global model only.
    """

    train: Dataset
    test: Dataset


@runtime_checkable
class DataSource(Protocol):
    """Whatever can load a training and a test set: a component of this package or a user's own."""

    def load(self) -> TrainTest:
        """Load both sets; the same ones every time.

        Raises:
            DataError: files are missing or malformed.
        """
        ...


def _check_inputs(inputs: torch.Tensor, mean: tuple[float, ...]) -> None:
    shape = list(inputs.shape)
    if inputs.dtype == torch.uint8:
        if inputs.dim() not in (3, 4) or (inputs.dim() == 4 and shape[3] > _MAX_IMAGE_CHANNELS):
            raise DataError(
                f"uint8 inputs are taken for images, [N,H,W] or [N,H,W,C] with at most "
                f"{_MAX_IMAGE_CHANNELS} channels, but have shape {shape}; move the channels last, or "
                "convert what is not an image to float32 or int64"
            )
        channels = 1 if inputs.dim() == 3 else shape[3]
    elif inputs.is_floating_point():
        channels = shape[1] if inputs.dim() > 1 else 0
    else:
        channels = 0
    if mean and len(mean) != channels:
        raise DataError(
            f"mean and std have {len(mean)} channels, but inputs of shape {shape} and {inputs.dtype} "
            f"have {channels} that can be normalised"
        )


def _as_indices(indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
    rows = torch.as_tensor(indices) if len(indices) else torch.zeros(0, dtype=torch.int64)
    if rows.dtype == torch.bool or rows.is_floating_point():
        raise ValueError(f"row numbers must be whole numbers, got {rows.dtype}")
    return rows.to(torch.int64)


def _image_batch(images: torch.Tensor) -> torch.Tensor:
    channels_first = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)


def _widened(rows: torch.Tensor) -> torch.Tensor:
    if rows.dtype in (torch.float16, torch.bfloat16):
        return rows.to(torch.float32)
    return rows if rows.is_floating_point() else rows.to(torch.int64)
