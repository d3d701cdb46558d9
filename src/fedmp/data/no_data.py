"""A data source without data: for a coordinator that has none, and only needs to know what a sample looks like."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt

from fedmp.component import Component
from fedmp.data.dataset import Dataset, TrainTest
from fedmp.errors import DataError

__all__ = ["NoData"]


class NoData(Component):
    """No samples, of a known shape.

    Args:
        shape: of one model input, without the batch; must be given.
        dtype: of the model's inputs, such as "float32", or "int64" for tokens.
    """

    shape: tuple[PositiveInt, ...] = ()
    dtype: str = Field(default="float32")

    def load(self) -> TrainTest:
        """Two empty sets.

        Raises:
            DataError: no shape was given, or torch has no such dtype.
        """
        if not self.shape:
            raise DataError("without data, say what one model input looks like, such as data.shape=[1,28,28]")
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise DataError(f"dtype is {self.dtype!r}; torch has no such dtype, use float32 or int64")
        empty = Dataset(torch.zeros((0, *self.shape), dtype=dtype), None)
        return TrainTest(train=empty, test=empty)
