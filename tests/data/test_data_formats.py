"""Publishers' formats: what is written as they publish it reads back the same, damage is named."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmp.data import CIFAR10, HAPT, MNIST, DataSource, Elec2, FashionMNIST, Shakespeare
from fedmp.errors import DataError

IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_arrays() -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(5, 28, 28), (5,), (3, 28, 28), (3,)]
    return [generator.integers(0, 256 if len(shape) > 1 else 10, shape).astype(np.uint8) for shape in shapes]


def write_idx(place: Path, *, zipped: bool = False, arrays: list[np.ndarray[Any, Any]] | None = None) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, array in zip(IDX_NAMES, arrays or idx_arrays(), strict=True):
        content = idx(array)
        (place / f"{name}{'.gz' * zipped}").write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("source", "place"),
    [(MNIST(), "MNIST/raw"), (MNIST(), "."), (FashionMNIST(), "FashionMNIST/raw"), (FashionMNIST(), ".")],
)
def test_idx_files_read_back(folder: Path, source: DataSource, place: str, zipped: bool) -> None:
    write_idx(folder / place, zipped=zipped)
    data = source.load()
    x_train, y_train, x_test, y_test = idx_arrays()
    assert data.train.inputs is not None
    assert data.test.inputs is not None
    np.testing.assert_array_equal(data.train.inputs.numpy(), x_train)
    np.testing.assert_array_equal(data.test.inputs.numpy(), x_test)
    assert data.train.target_batch(range(5)).tolist() == y_train.tolist()
    assert data.test.target_batch(range(3)).tolist() == y_test.tolist()


def test_fashion_mnist_files_are_not_taken_for_mnist(folder: Path) -> None:
    first_labels = np.array([9, 0, 0, 3, 0, 2, 7, 2, 5, 5], dtype=np.uint8)
    write_idx(folder, arrays=[np.zeros((10, 28, 28), dtype=np.uint8), first_labels, *idx_arrays()[2:]])
    assert len(FashionMNIST().load().train) == 10
    with pytest.raises(DataError, match="belongs to Fashion-MNIST, not to MNIST"):
        MNIST().load()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], r"promises 3920 bytes of shape \[5, 28, 28\] but holds 3919"),
        (lambda content: content + b"x", "holds 3921"),
        (lambda content: b"\x89PNG" + content[4:], "begins with 89 50 4e 47"),
        (lambda content: b"", "begins with nothing"),
    ],
)
def test_a_damaged_idx_file_is_named(folder: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    write_idx(folder)
    path = folder / IDX_NAMES[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        MNIST().load()
    assert str(path) in str(caught.value)


def test_a_truncated_gzip_file_is_named(folder: Path) -> None:
    write_idx(folder, zipped=True)
    path = folder / f"{IDX_NAMES[2]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{IDX_NAMES[2]}\.gz cannot be read"):
        MNIST().load()


def test_images_and_labels_that_do_not_match_are_named(folder: Path) -> None:
    arrays = idx_arrays()
    write_idx(folder, arrays=[arrays[0], arrays[1][:4], *arrays[2:]])
    with pytest.raises(DataError, match=rf"{IDX_NAMES[0]}.*5 inputs, 4 targets"):
        MNIST().load()


def test_a_label_out_of_range_is_named(folder: Path) -> None:
    arrays = idx_arrays()
    arrays[1][2] = 11
    write_idx(folder, arrays=arrays)
    with pytest.raises(DataError, match=r"classes from . to 11; they must be from 0 to 9"):
        MNIST().load()


@pytest.mark.parametrize("place", ["cifar-10-batches-bin", "."])
def test_cifar_binary_batches_read_back(folder: Path, place: str) -> None:
    (folder / place).mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 2, 32, 32, 3)).astype(np.uint8)
    labels = generator.integers(0, 10, (6, 2)).astype(np.uint8)
    for number, name in enumerate([*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"]):
        # a record is one label byte, then the red, the green and the blue plane, row by row
        planes = images[number].transpose(0, 3, 1, 2).reshape(2, -1)
        (folder / place / name).write_bytes(
            np.concatenate([labels[number][:, None], planes], axis=1).tobytes()
        )
    data = CIFAR10().load()
    assert data.train.inputs is not None
    np.testing.assert_array_equal(data.train.inputs.numpy(), images[:5].reshape(10, 32, 32, 3))
    assert data.train.target_batch(range(10)).tolist() == labels[:5].ravel().tolist()
    assert data.test.target_batch(range(2)).tolist() == labels[5].tolist()


def test_damaged_or_missing_cifar_batches_are_named(folder: Path) -> None:
    for index in range(1, 6):
        (folder / f"data_batch_{index}.bin").write_bytes(bytes(3073))
    with pytest.raises(DataError, match=r"part of CIFAR-10 is missing.*test_batch\.bin"):
        CIFAR10().load()
    (folder / "test_batch.bin").write_bytes(bytes(3072))
    with pytest.raises(DataError, match=r"test_batch\.bin has 3072 bytes"):
        CIFAR10().load()


def test_the_pickled_cifar_is_refused_unread(folder: Path) -> None:
    (folder / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"cifar-10-batches-py is the python version.*the binary version"):
        CIFAR10().load()


class Trap:
    """Unpickling this would fail the test."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a data file was unpickled",)


@pytest.mark.parametrize("hide", ["whole file", "object array"])
def test_reading_never_unpickles(folder: Path, hide: str) -> None:
    path = folder / "mnist.npz"
    if hide == "whole file":
        path.write_bytes(pickle.dumps(Trap()))
    else:
        trap = np.array([Trap()], dtype=object)
        np.savez(path, x_train=trap, y_train=trap, x_test=trap, y_test=trap)
    with pytest.raises(DataError, match=r"mnist\.npz is not a readable \.npz archive"):
        MNIST().load()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x_train": np.zeros((2, 28, 28), dtype=np.uint8)},
            "lacks y_train, x_test, y_test; it holds x_train",
        ),
        (
            {key: np.zeros(3, dtype=np.uint8) for key in ("x_train", "y_train", "x_test", "y_test")},
            r"shape \[3\]",
        ),
        ({key: np.zeros((3, 28, 28)) for key in ("x_train", "y_train", "x_test", "y_test")}, "dtype float64"),
    ],
)
def test_an_archive_with_other_arrays_is_named(folder: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(folder / "mnist.npz", **arrays)
    with pytest.raises(DataError, match=message):
        MNIST().load()


def test_an_empty_or_truncated_or_single_array_archive_is_named(folder: Path) -> None:
    path = folder / "elec2.npz"
    np.savez(path, x=np.zeros((9, 6), dtype=np.float32), y=np.zeros(9, dtype=np.int64))
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"elec2\.npz is not a readable \.npz archive"):
            Elec2().load()
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"elec2\.npz is a single array"):
        Elec2().load()


def test_inputs_that_are_not_finite_are_named(folder: Path) -> None:
    x = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    x[8, 2] = np.nan
    np.savez(folder / "elec2.npz", x=x, y=np.zeros(9, dtype=np.int64))
    with pytest.raises(DataError, match=r"elec2\.npz holds inputs that are not finite"):
        Elec2().load()


@pytest.mark.parametrize("source", [MNIST(), FashionMNIST(), CIFAR10(), HAPT(), Shakespeare(), Elec2()])
def test_a_missing_data_set_says_what_where_and_whence_on_one_line(folder: Path, source: DataSource) -> None:
    with pytest.raises(DataError) as caught:
        source.load()
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        str(folder),
        "set by FEDMP_DATA_DIR",
        "https://",
        "data=fashion_mnist_excerpt, which needs no files",
    ):
        assert part in message


def test_the_cache_folder_is_used_without_the_environment_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEDMP_DATA_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    with pytest.raises(
        DataError, match=r"fedmp \(the cache folder; set FEDMP_DATA_DIR for another\), which does not exist"
    ):
        MNIST().load()
    write_idx(tmp_path / "fedmp" / "MNIST" / "raw")
    assert len(MNIST().load().train) == 5
