"""HAPT, activities of 30 people seen by the accelerometer and gyroscope of their smartphone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from fedmp.component import Component
from fedmp.data.dataset import TrainTest
from fedmp.data.files import Array, data_folder, find, make_dataset, missing, read_npz
from fedmp.data.formats import read_hapt
from fedmp.errors import DataError

__all__ = ["HAPT"]

_LABEL_NAMES = (
    *("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "lying"),
    *("stand to sit", "sit to stand", "sit to lie", "lie to sit", "stand to lie", "lie to stand"),
)
_RAW_FOLDERS = ("RawData", "HAPT/RawData", "HAPT Data Set/RawData")


class HAPT(Component):
    """UCI HAPT (Reyes-Ortiz et al. 2016): windows of 2.56 s at 50 Hz, 12 activities, 30 users.

    Windows overlap by half, so whole stretches of one activity are held out, of each user and activity
    about the same share: no test window shares readings with a training window.

    Args:
        test_fraction: share of each user's stretches to hold out; more than 0, less than 1.
        seed: picks the stretches.
    """

    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)

    def load(self) -> TrainTest:
        """Load both sets.

        Inputs are float16 [N,6,128] (channels first, for a 1-d convolution): accelerometer x y z in g,
        gyroscope x y z in rad/s. A batch is float32, normalised per channel by the mean and standard
        deviation of the training set.

        Raises:
            DataError: the files are missing or malformed, or a set would be empty.
        """
        path, signals, labels, users = _read()
        is_test = _held_out(labels, users, fraction=self.test_fraction, seed=self.seed)
        if is_test.all() or not is_test.any():
            raise DataError(
                f"{path}: test_fraction={self.test_fraction} leaves {int((~is_test).sum())} training and "
                f"{int(is_test.sum())} test windows; choose another"
            )
        channels_first = signals.transpose(0, 2, 1)
        train = channels_first[~is_test].astype(np.float64)
        mean = tuple(float(value) for value in train.mean(axis=(0, 2)))
        std = tuple(float(value) for value in train.std(axis=(0, 2)))
        train_set, test_set = (
            make_dataset(
                path,
                channels_first[rows],
                labels[rows],
                label_names=_LABEL_NAMES,
                mean=mean,
                std=std,
                users=users[rows],
            )
            for rows in (~is_test, is_test)
        )
        return TrainTest(train=train_set, test=test_set)


def _read() -> tuple[Path, Array, Array, Array]:
    folder = data_folder()
    path = find(folder, ("hapt.npz",))
    if path is not None:
        arrays = read_npz(path, {"x": ("f", 3), "y": ("iu", 1), "user": ("iu", 1)})
        signals, labels, users = arrays["x"], arrays["y"], arrays["user"]
        if not len(signals) == len(labels) == len(users):
            raise DataError(
                f"{path}: {len(signals)} x, {len(labels)} y and {len(users)} user; they must be equal"
            )
        return path, signals.astype(np.float16), labels, users
    for place in _RAW_FOLDERS:
        if (folder / place / "labels.txt").exists():
            return folder / place, *read_hapt(folder / place)
    raise missing(
        "HAPT",
        looked_for=f"hapt.npz or labels.txt in {' or '.join(_RAW_FOLDERS)}",
        source="https://archive.ics.uci.edu/dataset/341",
    )


def _held_out(labels: Array, users: Array, *, fraction: float, seed: int) -> Array:
    """A mask of test windows: of each user and label, random whole runs, their number rounded at random.

    Windows of different runs never overlap, because a window lies within one labelled activity. Rounding
    at random keeps the share of every label at `fraction` over all users, however rare the label.
    """
    generator = np.random.default_rng(seed)
    is_start = np.concatenate([[True], (np.diff(labels) != 0) | (np.diff(users) != 0)])
    starts = np.flatnonzero(is_start)
    stops = np.append(starts[1:], len(labels))
    is_test = np.zeros(len(labels), dtype=bool)
    for user, label in sorted(set(zip(users.tolist(), labels.tolist(), strict=True))):
        runs = np.flatnonzero((users[starts] == user) & (labels[starts] == label))
        num_held = int(fraction * len(runs) + generator.random())
        for run in generator.permutation(runs)[:num_held]:
            is_test[starts[run] : stops[run]] = True
    return is_test
