"""What a split returns is checked once, and says whose rows are wrong."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedmp.data import Rows
from fedmp.errors import DataError

NAMES = ["ann", "bob"]


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 2], [1]],
        ((0, 2), range(1, 2)),
        [np.array([0, 2], dtype=np.uint16), np.array([1])],
        [torch.tensor([0, 2], dtype=torch.int32), array("q", [1])],
        np.array([[0, 2], [1, 1]]),
        Rows(torch.tensor([0, 2, 1]), [2, 1]),
    ],
    ids=["lists", "tuple and range", "numpy", "tensor and array", "one array", "rows"],
)
def test_any_sequence_of_whole_numbers_is_taken(parts: Sequence[Any]) -> None:
    rows = Rows.checked(parts, NAMES, num_rows=3)
    assert [part.dtype for part in rows] == [torch.int64] * 2
    assert [rows[0].tolist(), rows[-1].unique().tolist()] == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0]], "rows to 1 clients, but there are 2"),
        ([[0], []], "client bob has no training samples"),
        ([[0], [1, 3]], r"client bob row 3, but the 3 rows are numbered from 0 to 2"),
        ([[-1], [1]], "client ann row -1"),
        ([[0], [True]], r"client bob \[1\] torch.bool"),
        ([[0], [0.5]], r"client bob \[1\] torch.float64"),
        ([[0], [[1], [2]]], r"client bob \[2, 1\] torch.int64"),
        ([[0], ["a"]], "client bob no row numbers, but \\['a'\\]"),
        ([[0], [[1], [1, 2]]], "client bob no row numbers"),
        ([0, 1], r"client ann \[\] torch.int64"),
        ([None, None], "client ann no row numbers, but None"),
        (None, "the split gives None"),
    ],
)
def test_what_is_not_row_numbers_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Rows.checked(parts, NAMES, num_rows=3)


def test_rows_are_slices_of_one_tensor() -> None:
    rows = Rows.of_owners(np.array([1, 0, 1, 0]), 3)
    assert [part.tolist() for part in rows] == [[1, 3], [0, 2], []]
    assert [part.tolist() for part in rows[:2]] == [[1, 3], [0, 2]]
    assert rows[0].untyped_storage().data_ptr() == rows[1].untyped_storage().data_ptr()
    with pytest.raises(IndexError, match="no client 3"):
        rows[3]
