"""Who gets which sample: a training set comes in, each client's row numbers go out.

The rules here decide the client of every sample; `Rows` sorts the samples by client.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.data.dataset import Dataset
from fedmp.data.rows import RowNumbers, Rows
from fedmp.errors import DataError
from fedmp.records import ClientData

__all__ = ["IID", "ByUser", "Dirichlet", "Own", "PowerLaw", "Shards", "Split", "describe"]

_MAX_DRAWS = 1000


@runtime_checkable
class Split(Protocol):
    """A rule that spreads a data set over clients: one of this module or a user's own."""

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> Sequence[RowNumbers]:
        """The rows of each client.

        Args:
            dataset: the training set.
            num_clients: at least 1.
            seed: at least 0; the same seed gives the same rows.

        Returns:
            For each client its row numbers, in any sequence of whole numbers. The splits of this module return
            `Rows`, ascending, with each sample in exactly one of them.

        Raises:
            DataError: the data set lacks what the rule needs, or a client would have no samples.
        """
        ...


class IID(Component):
    """Shuffle, then deal equally: client sizes differ by one sample at most."""

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> Rows:
        """The rows of each client; see `Split.assign`."""
        rows = _generator(num_clients, seed).permutation(len(dataset))
        return _dealt(
            rows, np.repeat(np.arange(num_clients), _even(len(rows), num_clients)), num_clients, "IID"
        )


class Dirichlet(Component):
    """Label skew: each class is spread over the clients in proportions drawn from Dir(alpha).

    This is the label-wise form (Yurochkin et al. 2019; Li et al. 2022, NIID-Bench) of the Dirichlet split
    of Hsu et al. 2019, section 3, who draw each client's class proportions instead and give all clients
    the same number of samples. Here client sizes vary too. Proportions are drawn again until every client has
    `min_samples`.

    Args:
        alpha: concentration, above 0, at most 1e6; small is skewed (0.1: few classes a client).
        min_samples: the least that any client may have, at least 1.
    """

    alpha: float = Field(default=0.5, gt=0, le=1e6)
    min_samples: int = Field(default=10, ge=1)

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> Rows:
        """The rows of each client; see `Split.assign`.

        Raises:
            DataError: targets are not classes, or no draw gave every client `min_samples`.
        """
        generator = _generator(num_clients, seed)
        labels = _labels(dataset, "Dirichlet")
        by_class = [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
        sizes = self._draw_sizes(np.array([len(rows) for rows in by_class]), num_clients, generator)
        owners = np.repeat(np.tile(np.arange(num_clients), len(by_class)), sizes.ravel())
        return _dealt(np.concatenate(by_class), owners, num_clients, "Dirichlet")

    def _draw_sizes(
        self, class_sizes: npt.NDArray[Any], num_clients: int, generator: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """How many rows of each class each client gets, [classes, num_clients]."""
        total, needed = int(class_sizes.sum()), self.min_samples * num_clients
        if needed > total:
            raise DataError(
                f"Dirichlet(alpha={self.alpha}, min_samples={self.min_samples}) needs {needed} samples for "
                f"{num_clients} clients but there are {total}; use fewer clients or a smaller min_samples"
            )
        best = 0
        for _ in range(_MAX_DRAWS):
            shares = generator.dirichlet(np.full(num_clients, self.alpha), size=len(class_sizes))
            ends = np.minimum(np.cumsum(shares[:, :-1], axis=1), 1.0) * class_sizes[:, None]
            cuts = ends.astype(np.int64)
            sizes: npt.NDArray[np.int64] = np.diff(cuts, axis=1, prepend=0, append=class_sizes[:, None])
            smallest = int(sizes.sum(axis=0).min())
            if smallest >= self.min_samples:
                return sizes
            best = max(best, smallest)
        lower = " or a smaller min_samples" if self.min_samples > 1 else ""
        raise DataError(
            f"Dirichlet(alpha={self.alpha}, min_samples={self.min_samples}) left one of {num_clients} "
            f"clients short in all of {_MAX_DRAWS} draws from {total} samples: the smallest client had "
            f"{best} at best; use a larger alpha, fewer clients{lower}"
        )


class Shards(Component):
    """Sort by label, cut into equal shards, deal each client a few (McMahan et al. 2017, section 3).

    Args:
        shards_per_client: at least 1; about as many classes as a client will see.
    """

    shards_per_client: int = Field(default=2, ge=1)

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> Rows:
        """The rows of each client; see `Split.assign`.

        Raises:
            DataError: targets are not classes, or a client would have no samples.
        """
        generator = _generator(num_clients, seed)
        labels = _labels(dataset, "Shards")
        shuffled = generator.permutation(len(labels))
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        num_shards = num_clients * self.shards_per_client
        holders = np.empty(num_shards, dtype=np.int64)
        holders[generator.permutation(num_shards)] = np.arange(num_shards) // self.shards_per_client
        owners = np.repeat(holders, _even(len(labels), num_shards))
        return _dealt(by_label, owners, num_clients, "Shards")


class PowerLaw(Component):
    """Few labels a client and very unequal sizes, as of MNIST in Li et al. 2020 (FedProx, appendix C.1).

    Client k has the labels k, k + 1, ... (modulo their number) in a random order of clients. It gets
    `min_per_label` samples of each, and of what is left of a label a share in proportion to a number that is drawn
    from a log-normal distribution, which makes many small clients and a few large ones. As in the authors' code,
    but no sample is left over.

    Args:
        labels_per_client: at least 1, at most as many as there are.
        min_per_label: the least of each of its labels that any client has, at least 1.
        sigma: of the logarithm of the proportions; 2 in the paper's code, 0 for equal sizes.
    """

    labels_per_client: int = Field(default=2, ge=1)
    min_per_label: int = Field(default=5, ge=1)
    sigma: float = Field(default=2.0, ge=0, le=10)

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> Rows:
        """The rows of each client; see `Split.assign`.

        Raises:
            DataError: targets are not classes, or a label has too few samples or nobody to go to.
        """
        generator = _generator(num_clients, seed)
        labels = _labels(dataset, "PowerLaw")
        classes = np.unique(labels)
        if self.labels_per_client > len(classes):
            raise DataError(
                f"PowerLaw(labels_per_client={self.labels_per_client}) but there are {len(classes)} labels; use fewer"
            )
        places = generator.permutation(num_clients)
        dealt, owners = [], []
        for index, label in enumerate(classes):
            steps = (index - places) % len(classes)
            holders = np.flatnonzero(steps < self.labels_per_client)
            dealt.append(generator.permutation(np.flatnonzero(labels == label)))
            owners.append(np.repeat(holders, self._sizes(len(dealt[-1]), len(holders), generator)))
        return _dealt(np.concatenate(dealt), np.concatenate(owners), num_clients, "PowerLaw")

    def _sizes(
        self, num_samples: int, num_holders: int, generator: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """How many of one label's samples each of its holders gets."""
        spare = num_samples - num_holders * self.min_per_label
        if num_holders == 0 or spare < 0:
            raise DataError(
                f"PowerLaw(min_per_label={self.min_per_label}) has {num_samples} samples of a label for {num_holders} "
                f"clients; use more clients if there are none, otherwise fewer or a smaller min_per_label"
            )
        draws = generator.lognormal(0.0, self.sigma, num_holders)
        ends = np.round(np.cumsum(draws) / draws.sum() * spare).astype(np.int64)
        sizes: npt.NDArray[np.int64] = np.diff(ends, prepend=0) + self.min_per_label
        return sizes


class ByUser(Component):
    """Natural clients: a user's samples stay together.

    Users go largest first to the client with the fewest samples so far; the seed only orders users of
    equal size.
    """

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> Rows:
        """The rows of each client; see `Split.assign`.

        Raises:
            DataError: the data set has no users, or fewer than clients.
        """
        generator = _generator(num_clients, seed)
        if dataset.users is None:
            raise DataError(
                "ByUser needs the user of each sample, but this data set has none; use another split"
            )
        users, counts = np.unique(dataset.users.numpy(), return_counts=True)
        shuffled = generator.permutation(len(users))
        largest_first = shuffled[np.argsort(-counts[shuffled], kind="stable")]
        loads = [(0, client) for client in range(num_clients)]
        client_of_user = np.zeros(len(users), dtype=np.int64)
        for user in largest_first:
            load, client = heapq.heappop(loads)
            client_of_user[user] = client
            heapq.heappush(loads, (load + int(counts[user]), client))
        owners = client_of_user[np.searchsorted(users, dataset.users.numpy())]
        everything = np.arange(len(dataset))
        return _dealt(everything, owners, num_clients, f"ByUser with {len(users)} users")


class Own(Component):
    """The data are the client's own already, on its own machines: no split at all.

    Each client has every row of what its devices load.
    """

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> Rows:
        """All rows for each client."""
        return Rows(torch.arange(len(dataset)).repeat(num_clients), [len(dataset)] * num_clients)


def describe(
    dataset: Dataset, assignments: Sequence[torch.Tensor], client_names: Sequence[str]
) -> tuple[ClientData, ...]:
    """Who holds what, for reports: each client's samples, in all and by label.

    Args:
        dataset: the set that was split.
        assignments: each client's rows.
        client_names: as many names.

    Raises:
        ValueError: there are not as many names as assignments.
    """
    if len(assignments) != len(client_names):
        raise ValueError(f"{len(assignments)} assignments but {len(client_names)} client names")
    targets = dataset.targets
    labels = None if targets is None or targets.dim() != 1 or targets.is_floating_point() else targets
    return tuple(
        ClientData(
            name=name,
            num_samples=len(rows),
            label_counts=()
            if labels is None
            else tuple(torch.bincount(labels[rows].long(), minlength=dataset.num_classes).tolist()),
        )
        for name, rows in zip(client_names, assignments, strict=True)
    )


def _generator(num_clients: int, seed: int) -> np.random.Generator:
    if num_clients < 1:
        raise ValueError(f"num_clients is {num_clients}; it must be at least 1")
    return np.random.default_rng(seed)


def _labels(dataset: Dataset, split: str) -> npt.NDArray[np.int64]:
    targets = dataset.targets
    if targets is None or targets.dim() != 1 or targets.is_floating_point():
        kind = "none" if targets is None else f"{list(targets.shape)} {targets.dtype}"
        raise DataError(
            f"{split} needs one class a sample as target, but the targets are {kind}; use IID or ByUser"
        )
    return targets.numpy().astype(np.int64)


def _even(total: int, num_parts: int) -> npt.NDArray[np.int64]:
    """Sizes of parts that differ by one at most, the larger first."""
    sizes = np.full(num_parts, total // num_parts)
    sizes[: total % num_parts] += 1
    return sizes


def _dealt(rows: npt.NDArray[np.int64], owners: npt.NDArray[np.int64], num_clients: int, split: str) -> Rows:
    """Every row given to its owner: `rows` has each row of the data set once, in the order of `owners`."""
    owner_of = np.empty(len(rows), dtype=np.int64)
    owner_of[rows] = owners
    dealt = Rows.of_owners(owner_of, num_clients)
    empty = next((client for client in range(num_clients) if dealt.size(client) == 0), None)
    if empty is not None:
        raise DataError(
            f"client {empty} would have no samples: {split} spreads {len(rows)} samples over "
            f"{num_clients} clients; use fewer clients or more data"
        )
    return dealt
