"""`ArrayData`: a user's own arrays arrive with the right dtypes, and broken ones are refused clearly."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from fedmp.data import ArrayData, DataSource
from fedmp.errors import DataError


def arrays(**changes: Any) -> dict[str, Any]:
    given = {
        "x_train": np.linspace(0, 1, 12).reshape(4, 3),
        "y_train": np.array([0, 1, 2, 0]),
        "x_test": np.zeros((2, 3)),
        "y_test": np.array([1, 3]),
    }
    return {**given, **changes}


def test_numpy_arrays_become_float32_and_int64() -> None:
    source = ArrayData(**arrays())
    data = source.load()
    x, y = data.train.batch(range(4))
    np.testing.assert_array_equal(x.numpy(), arrays()["x_train"].astype(np.float32))
    assert y.dtype == torch.int64
    assert isinstance(source, DataSource)


def test_classes_of_both_sets_count_and_every_slice_knows_them() -> None:
    data = ArrayData(**arrays()).load()
    assert data.train.select([0]).num_classes == 4
    assert data.test.label_names == ("0", "1", "2", "3")


def test_tensors_keep_their_floating_type_and_lists_work() -> None:
    double = ArrayData(torch.ones(2, 3).double(), [0.5, 1.5], torch.ones(1, 3).double(), [2.5]).load()
    x, y = double.train.batch([0, 1])
    assert (x.dtype, y.dtype) == (torch.float64, torch.float32)
    assert double.train.num_classes == 0


@pytest.mark.parametrize(
    "x",
    [
        np.arange(12, dtype=">f4").reshape(4, 3),
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12, dtype=np.uint16).reshape(4, 3),
        np.broadcast_to(np.float32(1.0), (4, 3)),
        np.arange(24.0)[::-2].reshape(4, 3),
    ],
    ids=["big-endian", "transposed", "uint16", "read-only", "negative stride"],
)
def test_awkward_numpy_layouts_are_read_correctly(x: np.ndarray[Any, Any]) -> None:
    data = ArrayData(**arrays(x_train=x, x_test=x[:2])).load()
    np.testing.assert_array_equal(data.train.input_batch(range(4)).numpy(), x.astype(np.float64))


def test_uint8_images_and_users_pass_through() -> None:
    data = ArrayData(
        torch.full((4, 2, 2), 255, dtype=torch.uint8),
        [0, 1, 0, 1],
        torch.zeros((1, 2, 2), dtype=torch.uint8),
        [0],
        users=[7, 7, 8, 8],
        mean=[0.5],
        std=[0.5],
    ).load()
    assert torch.equal(data.train.input_batch([0]), torch.ones(1, 1, 2, 2))
    assert data.train.users is not None
    assert data.train.users.tolist() == [7, 7, 8, 8]


def test_a_view_of_a_large_tensor_is_pickled_without_the_rest() -> None:
    large = torch.zeros(100_000, 3)
    source = ArrayData(large[:4], [0, 1, 0, 1], large[4:6], [0, 1])
    assert len(pickle.dumps(source)) < 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": [0, 1]}, "x_train has 4 samples but y_train has 2"),
        ({"y_test": [0]}, "x_test has 2 samples but y_test has 1"),
        (
            {"x_test": np.zeros((0, 3)), "y_test": []},
            r"x_test has shape \[0, 3\]; it needs at least one sample",
        ),
        ({"x_train": np.array([[0, 1], [0, np.nan], [np.inf, 1], [0, 1]])}, "2 values .* sample 1 of 4"),
        ({"y_train": np.array([0.0, np.nan, 1.0, 1.0])}, "y_train has 1 values that are not finite"),
        ({"x_test": np.zeros((2, 5))}, r"first is \[3\] torch.float32 and of the second \[5\]"),
        ({"x_test": np.zeros((2, 3), dtype=int)}, "the same kind of sample"),
        ({"y_train": [0, -1, 2, 0]}, "y_train has the class -1"),
        ({"label_names": ["a", "b"]}, "2 label_names but classes up to 3"),
        ({"users": [1, 2]}, "users must be 4 whole numbers"),
        ({"x_train": np.array([["a"]] * 4)}, "dtype <U1"),
    ],
)
def test_broken_arrays_are_refused_with_their_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ArrayData(**arrays(**changes))
