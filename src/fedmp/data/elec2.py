"""Elec2, the electricity market of New South Wales: the standard stream whose concept drifts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from fedmp.component import Component
from fedmp.data.dataset import TrainTest
from fedmp.data.files import Array, data_folder, find, make_dataset, missing, read_npz
from fedmp.data.formats import read_arff
from fedmp.errors import DataError

__all__ = ["Elec2"]

_COLUMNS = ("period", "nswprice", "nswdemand", "vicprice", "vicdemand", "transfer")
_LABEL_NAMES = ("down", "up")
_ARFF_NAMES = ("electricity-normalized.arff", "electricity.arff", "elecNormNew.arff")


class Elec2(Component):
    """Elec2 (Harries 1999): half-hourly prices and demands; does the price go up or down?

    Rows stay in time order, and the test set is the last part: a model is judged on the future.

    Args:
        test_fraction: share of the rows, counted from the end, to hold out; more than 0, less than 1.
    """

    test_fraction: float = Field(default=0.2, gt=0, lt=1)

    def load(self) -> TrainTest:
        """Load both sets.

        Inputs are float32 [N,6]: period, nswprice, nswdemand, vicprice, vicdemand, transfer (the
        published columns without date and day). A batch is normalised per column by the mean and
        standard deviation of the training set.

        Raises:
            DataError: the file is missing or malformed, or a set would be empty.
        """
        path, features, labels = _read()
        num_train = len(features) - round(self.test_fraction * len(features))
        if len(features) != len(labels) or not 0 < num_train < len(features):
            raise DataError(
                f"{path}: {len(features)} rows with {len(labels)} labels cannot be split at "
                f"test_fraction={self.test_fraction}"
            )
        train = features[:num_train].astype(np.float64)
        mean = tuple(float(value) for value in train.mean(axis=0))
        std = tuple(float(value) for value in train.std(axis=0))
        train_set, test_set = (
            make_dataset(path, features[rows], labels[rows], label_names=_LABEL_NAMES, mean=mean, std=std)
            for rows in (slice(None, num_train), slice(num_train, None))
        )
        return TrainTest(train=train_set, test=test_set)


def _read() -> tuple[Path, Array, Array]:
    folder = data_folder()
    path = find(folder, ("elec2.npz",))
    if path is not None:
        arrays = read_npz(path, {"x": ("f", 2), "y": ("iu", 1)})
        return path, arrays["x"].astype(np.float32), arrays["y"]
    path = find(folder, _ARFF_NAMES)
    if path is None:
        raise missing(
            "Elec2",
            looked_for=f"elec2.npz or {' or '.join(_ARFF_NAMES)}",
            source="https://www.openml.org/d/151",
        )
    columns = read_arff(path, (*_COLUMNS, "class"))
    try:
        features = np.array([columns[name] for name in _COLUMNS], dtype=np.float32).T
        labels = np.array([_LABEL_NAMES.index(label.lower()) for label in columns["class"]])
    except ValueError as error:
        raise DataError(f"{path} holds something that is not a number, UP or DOWN: {error}") from error
    return path, features, labels
