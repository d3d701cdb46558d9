"""The split of FedProx's MNIST: few labels a client, sizes over orders of magnitude."""

from __future__ import annotations

import pytest
import torch

from fedmp.data import Dataset, PowerLaw
from fedmp.errors import DataError


def labelled(num_samples: int, num_classes: int = 10) -> Dataset:
    return Dataset(None, torch.arange(num_samples) % num_classes)


@pytest.mark.parametrize("num_clients", [10, 37, 100])
def test_each_sample_goes_to_one_client_and_each_client_has_its_labels(num_clients: int) -> None:
    data = labelled(6007)
    assert data.targets is not None
    rows = PowerLaw(min_per_label=3).assign(data, num_clients, 1)
    assert torch.cat(list(rows)).sort().values.tolist() == list(range(6007))
    for own in rows:
        labels, counts = data.targets[own].unique(return_counts=True)
        assert len(labels) == 2
        assert (labels[1] - labels[0]).item() in (1, 9)  # neighbours, 9 and 0 as well
        assert counts.min() >= 3


def test_sizes_spread_with_sigma() -> None:
    def sizes(sigma: float) -> torch.Tensor:
        rows = PowerLaw(sigma=sigma).assign(labelled(60_000), 1000, 0)
        return torch.tensor([len(own) for own in rows])

    assert sizes(0).max() - sizes(0).min() <= 4  # two labels, each rounded
    unequal = sizes(2).double()
    # published: 1,000 clients, 69 samples on average and a standard deviation of 106
    assert unequal.mean() == 60
    assert 60 < unequal.std() < 250
    assert unequal.median() < 30
    assert unequal.max() > 500


def test_the_seed_decides() -> None:
    first, again, other = (PowerLaw().assign(labelled(5000), 50, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("split", "num_clients", "message"),
    [
        (PowerLaw(labels_per_client=11), 20, "there are 10 labels"),
        (PowerLaw(), 5, "for 0 clients|samples of a label"),
        (PowerLaw(min_per_label=60), 100, "has 100 samples of a label for 20 clients"),
    ],
    ids=repr,
)
def test_what_cannot_be_dealt_is_refused(split: PowerLaw, num_clients: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split.assign(labelled(1000), num_clients, 0)
