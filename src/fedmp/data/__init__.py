"""Samples on their way in: a source loads a training and a test set, a split gives each client its rows.

A `DataSource` reads files (or wraps arrays) and returns a `TrainTest` of two `Dataset`s; a `Split` turns
the training set into one list of row numbers per client; `Dataset.select` cuts a client's rows out, and
`Dataset.batch` makes what a model takes. Nothing here downloads, and reading never unpickles.
"""

from __future__ import annotations

from fedmp.data.arrays import ArrayData
from fedmp.data.dataset import Dataset, DataSource, TrainTest
from fedmp.data.elec2 import Elec2
from fedmp.data.hapt import HAPT
from fedmp.data.images import CIFAR10, MNIST, FashionMNIST, FashionMNISTExcerpt
from fedmp.data.no_data import NoData
from fedmp.data.rows import RowNumbers, Rows
from fedmp.data.shakespeare import Shakespeare
from fedmp.data.splits import IID, ByUser, Dirichlet, Own, PowerLaw, Shards, Split, describe
from fedmp.data.synthetic import Synthetic

__all__ = [
    "CIFAR10",
    "HAPT",
    "IID",
    "MNIST",
    "ArrayData",
    "ByUser",
    "DataSource",
    "Dataset",
    "Dirichlet",
    "Elec2",
    "FashionMNIST",
    "FashionMNISTExcerpt",
    "NoData",
    "Own",
    "PowerLaw",
    "RowNumbers",
    "Rows",
    "Shakespeare",
    "Shards",
    "Split",
    "Synthetic",
    "TrainTest",
    "describe",
]
