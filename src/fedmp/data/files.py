"""Where data files lie and how they are read: names come in, checked arrays or one clear error go out."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import platformdirs
import torch

from fedmp.data.dataset import Dataset
from fedmp.errors import DataError

__all__ = ["Array", "data_folder", "find", "make_dataset", "missing", "read_bytes", "read_npz", "read_text"]

Array: TypeAlias = npt.NDArray[Any]

_ENVIRONMENT_VARIABLE = "FEDMP_DATA_DIR"


def data_folder() -> Path:
    """The folder that data sets are loaded from: FEDMP_DATA_DIR if set, else the user's cache folder."""
    chosen = os.environ.get(_ENVIRONMENT_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("fedmp"))


def find(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that exists in `folder`, also with ".gz" added, or None."""
    candidates = (folder / candidate for name in names for candidate in (name, f"{name}.gz"))
    return next((path for path in candidates if path.exists()), None)


def missing(title: str, *, looked_for: str, source: str, hint: str = "") -> DataError:
    """The error for a data set that is not there, on one line.

    Args:
        title: the data set's name.
        looked_for: the files, relative to the data folder.
        source: where to get them.
        hint: what was found instead, if that explains anything.
    """
    folder = data_folder()
    origin = (
        f"set by {_ENVIRONMENT_VARIABLE}"
        if os.environ.get(_ENVIRONMENT_VARIABLE)
        else (f"the cache folder; set {_ENVIRONMENT_VARIABLE} for another")
    )
    state = "" if folder.is_dir() else ", which does not exist,"
    return DataError(
        f"{title} is missing: looked in {folder} ({origin}){state} for {looked_for}; "
        f"{hint}get it from {source}, or choose data=fashion_mnist_excerpt, which needs no files"
    )


def read_npz(path: Path, keys: Mapping[str, tuple[str, int]]) -> dict[str, Array]:
    """Arrays of a numpy archive, never unpickling.

    Args:
        path: the archive.
        keys: the arrays to read, each with the allowed kinds of its dtype (such as "u" or "iu") and
            its number of dimensions.

    Raises:
        DataError: the file is not such an archive, or an array is missing or of another kind.
    """
    try:
        # opened here because numpy 2.4 leaves the file open when it turns out to be damaged
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is a single array; an .npz archive with {', '.join(keys)} is needed")
            absent = [key for key in keys if key not in archive.files]
            if absent:
                raise DataError(
                    f"{path} lacks {', '.join(absent)}; it holds {', '.join(archive.files) or 'nothing'}"
                )
            arrays = {key: archive[key] for key in keys}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable .npz archive: {error}") from error
    for key, (kinds, dims) in keys.items():
        if arrays[key].dtype.kind not in kinds or arrays[key].ndim != dims:
            raise DataError(
                f"{path}: {key} has dtype {arrays[key].dtype} and shape {list(arrays[key].shape)}; "
                f"{dims} dimensions of kind {' or '.join(kinds)} are needed"
            )
    return arrays


def read_bytes(path: Path) -> bytes:
    """All bytes of a file, unzipped if its name ends in ".gz".

    Raises:
        DataError: the file cannot be read or its compression is damaged.
    """
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """A file's text in UTF-8, unzipped if its name ends in ".gz".

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error


def make_dataset(
    path: Path,
    inputs: Array,
    targets: Array,
    *,
    label_names: tuple[str, ...],
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    users: Array | None = None,
) -> Dataset:
    """A data set from arrays that were read from `path`; it owns its memory.

    Raises:
        DataError: there are no samples, lengths disagree, a class is out of range or an input is not
            finite; the message names the file.
    """
    if len(inputs) == 0:
        raise DataError(f"{path} holds no samples")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(label_names):
        raise DataError(
            f"{path} has classes from {targets.min()} to {targets.max()}; "
            f"they must be from 0 to {len(label_names) - 1}"
        )
    if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
        raise DataError(f"{path} holds inputs that are not finite (NaN or infinite)")
    try:
        return Dataset(
            inputs=torch.from_numpy(np.array(inputs, order="C")),
            targets=torch.from_numpy(targets.astype(np.int64)),
            users=None if users is None else torch.from_numpy(users.astype(np.int64)),
            mean=mean,
            std=std,
            label_names=label_names,
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
