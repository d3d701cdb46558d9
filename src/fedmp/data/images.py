"""Image data sets: MNIST, Fashion-MNIST with the excerpt that fedmp ships, and CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fedmp.component import Component
from fedmp.data.dataset import TrainTest
from fedmp.data.files import Array, data_folder, find, make_dataset, missing, read_npz
from fedmp.data.formats import read_cifar10, read_idx
from fedmp.errors import DataError

__all__ = ["CIFAR10", "MNIST", "FashionMNIST", "FashionMNISTExcerpt"]


@dataclass(frozen=True)
class _Facts:
    title: str
    npz: tuple[str, ...]
    folders: tuple[str, ...]
    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_names: tuple[str, ...]
    first_labels: tuple[int, ...] = ()


_MNIST = _Facts(
    title="MNIST",
    npz=("mnist.npz",),
    folders=("MNIST/raw", "MNIST", "mnist", "."),
    source="http://yann.lecun.com/exdb/mnist/ (mirror: https://ossci-datasets.s3.amazonaws.com/mnist/)",
    mean=(0.1307,),
    std=(0.3081,),
    label_names=tuple("0123456789"),
    first_labels=(5, 0, 4, 1, 9, 2, 1, 3, 1, 4),
)
_FASHION_MNIST = _Facts(
    title="Fashion-MNIST",
    npz=("fashion_mnist.npz",),
    folders=("FashionMNIST/raw", "FashionMNIST", "fashion_mnist", "."),
    source="https://github.com/zalandoresearch/fashion-mnist",
    mean=(0.2860,),
    std=(0.3530,),
    label_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    first_labels=(9, 0, 0, 3, 0, 2, 7, 2, 5, 5),
)
_CIFAR10 = _Facts(
    title="CIFAR-10",
    npz=("cifar10.npz",),
    folders=("cifar-10-batches-bin", "."),
    source="https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    label_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
)
_CIFAR10_EXCERPTS = ("cifar10_12k.npz",)


class FashionMNISTExcerpt(Component):
    """6,000 training and 1,000 test images of Fashion-MNIST, 10 balanced classes; ships with fedmp.

    Example:
        >>> len(FashionMNISTExcerpt().load().train)
        6000
    """

    def load(self) -> TrainTest:
        """Load both sets; needs no files. Inputs are uint8 [N,28,28]."""
        shipped = resources.files("fedmp.data") / "excerpt" / "fashion_mnist_excerpt.npz"
        with resources.as_file(shipped) as path:
            return _load_npz(path, _FASHION_MNIST, num_dims=3)


class FashionMNIST(Component):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 training and 10,000 test images of clothes, 10 classes."""

    def load(self) -> TrainTest:
        """Load both sets. Inputs are uint8 [N,28,28].

        Raises:
            DataError: the files are missing or malformed.
        """
        return _load_idx_or_npz(_FASHION_MNIST)


class MNIST(Component):
    """MNIST (LeCun et al. 1998): 60,000 training and 10,000 test images of digits, 10 classes."""

    def load(self) -> TrainTest:
        """Load both sets. Inputs are uint8 [N,28,28].

        Raises:
            DataError: the files are missing or malformed.
        """
        return _load_idx_or_npz(_MNIST)


class CIFAR10(Component):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test photographs, 10 classes.

    An excerpt named cifar10_12k.npz is used where the whole set is not found.
    """

    def load(self) -> TrainTest:
        """Load both sets. Inputs are uint8 [N,32,32,3].

        Raises:
            DataError: the files are missing or malformed.
        """
        folder = data_folder()
        whole = find(folder, _CIFAR10.npz)
        if whole is not None:
            return _load_npz(whole, _CIFAR10, num_dims=4)
        for place in _CIFAR10.folders:
            if (folder / place / "data_batch_1.bin").exists():
                return _load_cifar_binary(folder / place)
        excerpt = find(folder, _CIFAR10_EXCERPTS)
        if excerpt is not None:
            return _load_npz(excerpt, _CIFAR10, num_dims=4)
        pickled = find(folder, ("cifar-10-batches-py", "cifar-10-python.tar", "data_batch_1"))
        refusal = "is the python version, which fedmp does not read because unpickling runs code; "
        raise missing(
            "CIFAR-10",
            looked_for="cifar10.npz, cifar-10-batches-bin/data_batch_1.bin or cifar10_12k.npz",
            source=_CIFAR10.source,
            hint=f"{pickled.name} {refusal}" if pickled else "",
        )


def _load_idx_or_npz(facts: _Facts) -> TrainTest:
    folder = data_folder()
    archive = find(folder, facts.npz)
    if archive is not None:
        return _load_npz(archive, facts, num_dims=3)
    for place in facts.folders:
        if find(folder / place, ("train-images-idx3-ubyte",)) is not None:
            return _load_idx(folder / place, facts)
    raise missing(
        facts.title,
        looked_for=f"{facts.npz[0]} or the four files named like train-images-idx3-ubyte[.gz], "
        f"in it or in {' or '.join(facts.folders[:-1])}",
        source=facts.source,
    )


def _load_npz(path: Path, facts: _Facts, *, num_dims: int) -> TrainTest:
    arrays = read_npz(
        path,
        {"x_train": ("u", num_dims), "y_train": ("iu", 1), "x_test": ("u", num_dims), "y_test": ("iu", 1)},
    )
    train, test = (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])
    return _train_test(facts, path, train, path, test)


def _load_idx(folder: Path, facts: _Facts) -> TrainTest:
    paths = {}
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        path = find(folder, (name,))
        if path is None:
            raise missing(facts.title, looked_for=f"{folder / name}[.gz]", source=facts.source)
        paths[name] = path
    train_images, train_labels, test_images, test_labels = paths.values()
    labels = read_idx(train_labels, num_dims=1)
    _check_not_another(facts, train_labels, labels)
    train = read_idx(train_images, num_dims=3), labels
    test = read_idx(test_images, num_dims=3), read_idx(test_labels, num_dims=1)
    return _train_test(facts, train_images, train, test_images, test)


def _check_not_another(facts: _Facts, path: Path, labels: Array) -> None:
    """MNIST and Fashion-MNIST are published under the same file names; their first labels differ."""
    for other in (_MNIST, _FASHION_MNIST):
        if other is not facts and tuple(labels[: len(other.first_labels)].tolist()) == other.first_labels:
            raise DataError(
                f"{path} belongs to {other.title}, not to {facts.title}, whose files have the same names; "
                f"keep each in a folder of its own: {other.folders[0]} and {facts.folders[0]}"
            )


def _load_cifar_binary(folder: Path) -> TrainTest:
    batches = [folder / f"data_batch_{number}.bin" for number in range(1, 6)]
    test_batch = folder / "test_batch.bin"
    absent = [path.name for path in (*batches, test_batch) if not path.exists()]
    if absent:
        raise missing(
            "part of CIFAR-10", looked_for=f"{', '.join(absent)} in {folder}", source=_CIFAR10.source
        )
    return _train_test(_CIFAR10, folder, read_cifar10(batches), test_batch, read_cifar10([test_batch]))


def _train_test(
    facts: _Facts, train_path: Path, train: tuple[Array, Array], test_path: Path, test: tuple[Array, Array]
) -> TrainTest:
    names, mean, std = facts.label_names, facts.mean, facts.std
    return TrainTest(
        train=make_dataset(train_path, *train, label_names=names, mean=mean, std=std),
        test=make_dataset(test_path, *test, label_names=names, mean=mean, std=std),
    )
