"""The publishers' own file formats, read into numpy arrays: IDX, CIFAR-10 binary, HAPT text, ARFF."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmp.data.files import Array, read_bytes, read_text
from fedmp.errors import DataError

__all__ = ["read_arff", "read_cifar10", "read_hapt", "read_idx"]

_IDX_UINT8 = 0x08
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
_HAPT_WINDOW = 128
_HAPT_STEP = 64


def read_idx(path: Path, *, num_dims: int) -> Array:
    """An array of bytes in LeCun's IDX format.

    Args:
        path: the file; gzipped if its name ends in ".gz".
        num_dims: 3 for images, 1 for labels.

    Returns:
        uint8 array with `num_dims` dimensions.

    Raises:
        DataError: the file is not IDX with unsigned bytes in so many dimensions, or is cut short.
    """
    content = read_bytes(path)
    header_bytes = 4 + 4 * num_dims
    if len(content) < header_bytes or content[:4] != bytes((0, 0, _IDX_UINT8, num_dims)):
        raise DataError(
            f"{path} is not an IDX file of bytes with {num_dims} dimensions: "
            f"it begins with {content[:4].hex(' ') or 'nothing'}"
        )
    shape = struct.unpack(f">{num_dims}I", content[4:header_bytes])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - header_bytes != expected:
        raise DataError(
            f"{path} promises {expected} bytes of shape {list(shape)} but holds {len(content) - header_bytes}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)


def read_cifar10(paths: Sequence[Path]) -> tuple[Array, Array]:
    """Images and labels of CIFAR-10's binary version, files in the given order.

    Returns:
        uint8 images [N,32,32,3] and labels [N].

    Raises:
        DataError: a file is not a whole number of records.
    """
    records = []
    for path in paths:
        content = np.frombuffer(read_bytes(path), dtype=np.uint8)
        if len(content) == 0 or len(content) % _CIFAR_RECORD_BYTES:
            raise DataError(
                f"{path} has {len(content)} bytes; the CIFAR-10 binary version has "
                f"{_CIFAR_RECORD_BYTES} for every image"
            )
        records.append(content.reshape(-1, _CIFAR_RECORD_BYTES))
    table = np.concatenate(records)
    return table[:, 1:].reshape(-1, *_CIFAR_SHAPE).transpose(0, 2, 3, 1), table[:, 0]


def read_hapt(folder: Path) -> tuple[Array, Array, Array]:
    """Windows of HAPT's recordings (the folder RawData of the published archive).

    A recording is cut every 64 readings into windows of 128 (2.56 s, half of it shared with the next
    window); a window counts if it lies within one labelled activity, as the publishers' windows do.

    Args:
        folder: has labels.txt (experiment, user, activity, first and last reading, all from 1) and
            acc_expXX_userYY.txt and gyro_expXX_userYY.txt with three columns each.

    Returns:
        float16 signals [N,128,6] (accelerometer x y z in g, gyroscope x y z in rad/s), activities [N]
        from 0, users [N] from 1; by user, then in time order.

    Raises:
        DataError: a file is missing or malformed.
    """
    segments = _read_table(folder / "labels.txt", num_columns=5).astype(np.int64)
    windows: list[Array] = []
    activities: list[int] = []
    users: list[int] = []
    for experiment, user in sorted(
        {(int(row[0]), int(row[1])) for row in segments}, key=lambda pair: pair[::-1]
    ):
        suffix = f"exp{experiment:02d}_user{user:02d}.txt"
        acc, gyro = (_read_table(folder / f"{sensor}_{suffix}", num_columns=3) for sensor in ("acc", "gyro"))
        if len(acc) != len(gyro):
            raise DataError(f"{folder / suffix}: {len(acc)} accelerometer but {len(gyro)} gyroscope readings")
        signal = np.concatenate([acc, gyro], axis=1).astype(np.float16)
        for start in range(0, len(signal) - _HAPT_WINDOW + 1, _HAPT_STEP):
            for _, _, activity, first, last in segments[(segments[:, :2] == (experiment, user)).all(axis=1)]:
                if first - 1 <= start and start + _HAPT_WINDOW <= last:
                    windows.append(signal[start : start + _HAPT_WINDOW])
                    activities.append(int(activity) - 1)
                    users.append(user)
    if not windows:
        raise DataError(f"{folder / 'labels.txt'} labels no stretch of {_HAPT_WINDOW} readings")
    return np.stack(windows), np.array(activities), np.array(users)


def read_arff(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns of an ARFF file (Weka, MOA, OpenML) without quoted values, as text.

    Args:
        path: the file.
        columns: names of the attributes to read, in lower case.

    Raises:
        DataError: there is no data, an attribute is missing, or a row has too few values.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("%")]
    start = next((at for at, line in enumerate(lines) if line.lower() == "@data"), len(lines))
    names = [
        line.split()[1].strip("'\"").lower()
        for line in lines[:start]
        if line.lower().startswith("@attribute ")
    ]
    absent = [name for name in columns if name not in names]
    if absent or start + 1 >= len(lines):
        raise DataError(
            f"{path} is not the expected ARFF file: it lacks {', '.join(absent) or 'data after @data'}"
        )
    rows = [line.split(",") for line in lines[start + 1 :]]
    bad = next((number for number, row in enumerate(rows, start=1) if len(row) != len(names)), None)
    if bad is not None:
        raise DataError(
            f"{path}: row {bad} of the data has {len(rows[bad - 1])} values; {len(names)} are needed"
        )
    return {name: [row[names.index(name)].strip() for row in rows] for name in columns}


def _read_table(path: Path, *, num_columns: int) -> Array:
    try:
        values = np.array(read_text(path).split(), dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path} holds something that is not a number: {error}") from error
    if len(values) == 0 or len(values) % num_columns:
        raise DataError(f"{path} has {len(values)} numbers; it needs {num_columns} in every line")
    return values.reshape(-1, num_columns)
