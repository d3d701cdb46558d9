"""Make the excerpt of Fashion-MNIST that fedmp ships, from the whole data set in FEDMP_DATA_DIR.

Run it from anywhere: `FEDMP_DATA_DIR=... python benchmarks/make_excerpt.py`. It picks as many images of
each class, with a fixed seed, and writes the same arrays every time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedmp.data import Dataset, FashionMNIST

TRAIN_PER_CLASS = 600
TEST_PER_CLASS = 100
SEED = 0
TARGET = Path(__file__).parents[1] / "src" / "fedmp" / "data" / "excerpt" / "fashion_mnist_excerpt.npz"


def excerpt() -> dict[str, Any]:
    """The excerpt's arrays, under the names of the whole archive."""
    whole = FashionMNIST().load()
    generator = np.random.default_rng(SEED)
    arrays = {}
    for part, dataset, per_class in (
        ("train", whole.train, TRAIN_PER_CLASS),
        ("test", whole.test, TEST_PER_CLASS),
    ):
        chosen = dataset.select(pick(dataset, per_class, generator))
        assert chosen.inputs is not None
        assert chosen.targets is not None
        arrays[f"x_{part}"] = chosen.inputs.numpy()
        arrays[f"y_{part}"] = chosen.targets.numpy().astype(np.uint8)
    return arrays


def pick(dataset: Dataset, per_class: int, generator: np.random.Generator) -> list[int]:
    """Row numbers of `per_class` random samples of each class, shuffled."""
    assert dataset.targets is not None
    labels = dataset.targets.numpy()
    rows = [
        generator.choice(np.flatnonzero(labels == label), size=per_class, replace=False)
        for label in range(dataset.num_classes)
    ]
    return generator.permutation(np.concatenate(rows)).tolist()  # type: ignore[no-any-return]


if __name__ == "__main__":
    np.savez_compressed(TARGET, **excerpt())
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")
