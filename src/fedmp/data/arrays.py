"""A user's own arrays as a data source: numpy arrays or tensors come in, checked data sets come out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedmp.data.dataset import Dataset, TrainTest
from fedmp.errors import DataError

__all__ = ["ArrayData"]

_MAX_NUMBERED_CLASSES = 1 << 16


class ArrayData:
    """Training and test samples that are already in memory.

    numpy's float64 becomes float32, as models are float32 by default; a torch tensor keeps its floating
    type. Arrays are not copied where they need no conversion, so leave them unchanged afterwards.

    Args:
        x_train, x_test: inputs [N, ...]; see `Dataset` for what each dtype means.
        y_train, y_test: targets [N, ...]; whole numbers are classes from 0 up, floats are values.
        users: [N] whole numbers: whom each training sample comes from, for the split `ByUser`.
        mean, std: per channel, applied when a batch is made; empty for none.
        label_names: names of the classes; by default their numbers.

    Raises:
        DataError: lengths or shapes disagree, a set is empty, a value is not finite, or a class is
            negative or has no name.

    Example:
        >>> source = ArrayData(np.eye(4), [0, 1, 0, 1], np.eye(4), [0, 1, 0, 1])
        >>> source.load().train
        Dataset(inputs=[4, 4] torch.float32, targets=[4] torch.int64, users=None, labels=2)
    """

    def __init__(
        self,
        x_train: torch.Tensor | npt.ArrayLike,
        y_train: torch.Tensor | npt.ArrayLike,
        x_test: torch.Tensor | npt.ArrayLike,
        y_test: torch.Tensor | npt.ArrayLike,
        *,
        users: torch.Tensor | npt.ArrayLike | None = None,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        label_names: Sequence[str] = (),
    ) -> None:
        inputs = (_as_tensor("x_train", x_train), _as_tensor("x_test", x_test))
        targets = (_as_targets("y_train", y_train), _as_targets("y_test", y_test))
        _check_alike("x_train", inputs[0], "x_test", inputs[1])
        _check_alike("y_train", targets[0], "y_test", targets[1])
        _check_length("x_train", inputs[0], "y_train", targets[0])
        _check_length("x_test", inputs[1], "y_test", targets[1])
        owners = None if users is None else _as_tensor("users", users)
        if owners is not None:
            _check_users(owners, num_samples=len(inputs[0]))
        names = _label_names(targets, tuple(label_names))
        spread = (tuple(map(float, mean)), tuple(map(float, std)))
        self._data = TrainTest(
            train=Dataset(inputs[0], targets[0], owners, *spread, names),
            test=Dataset(inputs[1], targets[1], None, *spread, names),
        )

    def __repr__(self) -> str:
        return f"ArrayData(train={self._data.train!r}, test={self._data.test!r})"

    def load(self) -> TrainTest:
        """The two data sets."""
        return self._data


def _as_tensor(name: str, values: torch.Tensor | npt.ArrayLike) -> torch.Tensor:
    tensor = _own(values) if isinstance(values, torch.Tensor) else _from_numpy(name, np.asarray(values))
    if tensor.dim() == 0 or len(tensor) == 0:
        raise DataError(f"{name} has shape {list(tensor.shape)}; it needs at least one sample")
    if tensor.is_complex():
        raise DataError(f"{name} has dtype {tensor.dtype}; complex numbers are not supported")
    if tensor.is_floating_point():
        _check_finite(name, tensor)
    return tensor


def _as_targets(name: str, values: torch.Tensor | npt.ArrayLike) -> torch.Tensor:
    tensor = _as_tensor(name, values)
    return tensor if tensor.is_floating_point() else tensor.to(torch.int64)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU in a storage of its own: pickling a view would send all it is a view of."""
    values = tensor.detach().cpu().contiguous()
    is_view = values.untyped_storage().nbytes() != values.numel() * values.element_size()
    return values.clone() if is_view else values


def _from_numpy(name: str, array: npt.NDArray[np.generic]) -> torch.Tensor:
    if array.dtype.kind == "f":
        dtype = np.float16 if array.dtype == np.float16 else np.float32
        return torch.from_numpy(_writable(array.astype(dtype, copy=False)))
    if array.dtype == np.uint8:
        return torch.from_numpy(_writable(array))
    if array.dtype.kind in "biu":
        return torch.from_numpy(_writable(array.astype(np.int64, copy=False)))
    raise DataError(f"{name} has dtype {array.dtype}; it must hold whole numbers or floating-point numbers")


def _writable(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """torch warns about memory that it may not write to, so such arrays are copied."""
    is_view = array.base is not None
    return np.array(array, order="C") if is_view else np.require(array, requirements=["C", "W"])


def _check_finite(name: str, values: torch.Tensor) -> None:
    if torch.stack(values.aminmax()).isfinite().all():  # a NaN is both; takes no memory, unlike what follows
        return
    is_bad = ~torch.isfinite(values)
    sample = int(is_bad.flatten(1).any(dim=1).nonzero()[0] if values.dim() > 1 else is_bad.nonzero()[0])
    raise DataError(
        f"{name} has {int(is_bad.sum())} values that are not finite (NaN or infinite), the first in "
        f"sample {sample} of {len(values)}; fill them in or leave those samples out"
    )


def _check_alike(name: str, first: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    same_kind = first.dtype == other.dtype or not (first.is_floating_point() or other.is_floating_point())
    if first.shape[1:] != other.shape[1:] or not same_kind:
        raise DataError(
            f"{name} and {other_name} must hold the same kind of sample, but a sample of the first is "
            f"{list(first.shape[1:])} {first.dtype} and of the second {list(other.shape[1:])} {other.dtype}"
        )


def _check_length(inputs_name: str, inputs: torch.Tensor, targets_name: str, targets: torch.Tensor) -> None:
    if len(inputs) != len(targets):
        raise DataError(f"{inputs_name} has {len(inputs)} samples but {targets_name} has {len(targets)}")


def _check_users(users: torch.Tensor, *, num_samples: int) -> None:
    if users.is_floating_point() or list(users.shape) != [num_samples]:
        raise DataError(
            f"users must be {num_samples} whole numbers, one a training sample, but is "
            f"{list(users.shape)} {users.dtype}"
        )


def _label_names(targets: tuple[torch.Tensor, torch.Tensor], names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of all classes of both sets, so that every slice knows how many classes there are."""
    if targets[0].is_floating_point():
        return names
    for which, labels in zip(("y_train", "y_test"), targets, strict=True):
        if labels.min() < 0:
            raise DataError(f"{which} has the class {int(labels.min())}; classes count from 0")
    largest = max(int(labels.max()) for labels in targets)
    if names and largest >= len(names):
        raise DataError(f"there are {len(names)} label_names but classes up to {largest}")
    if names or largest >= _MAX_NUMBERED_CLASSES:
        return names
    return tuple(str(label) for label in range(largest + 1))
