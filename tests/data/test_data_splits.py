"""Splits: each sample exactly once, the same by seed, and never a client without data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedmp.data import IID, ByUser, Dataset, Dirichlet, Shards, Split, describe
from fedmp.errors import DataError

SPLITS: list[Split] = [
    IID(),
    Dirichlet(alpha=0.5, min_samples=1),
    Dirichlet(alpha=100.0, min_samples=1),
    Dirichlet(alpha=0.001, min_samples=1),
    Shards(),
    Shards(shards_per_client=3),
    ByUser(),
]


def make_dataset(num_samples: int, *, num_classes: int = 5, num_users: int = 30, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset(
        inputs=None,
        targets=torch.randint(num_classes, (num_samples,), generator=generator),
        users=torch.randint(num_users, (num_samples,), generator=generator) * 3 - 7,
        label_names=tuple(str(label) for label in range(num_classes)),
    )


@pytest.mark.parametrize("split", SPLITS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1, 300),
    num_clients=st.integers(1, 12),
    num_users=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_every_split_gives_each_sample_to_exactly_one_client(
    split: Split, num_samples: int, num_clients: int, num_users: int, seed: int
) -> None:
    dataset = make_dataset(num_samples, num_users=num_users, seed=seed)
    try:
        rows = split.assign(dataset, num_clients, seed)
    except DataError:
        return  # a client would be empty: the tests below say when that is right
    assert len(rows) == num_clients
    assert all(len(part) > 0 and part.dtype == torch.int64 for part in rows)
    assert all(torch.equal(part, part.sort().values) for part in rows)
    assert torch.cat(list(rows)).sort().values.tolist() == list(range(num_samples))


@pytest.mark.parametrize("split", [IID(), Dirichlet(), Shards()], ids=repr)
def test_the_seed_decides_and_global_generators_do_not(split: Split) -> None:
    dataset = make_dataset(500)
    first = split.assign(dataset, 6, 3)
    torch.manual_seed(99)
    np.random.seed(99)
    again = split.assign(dataset, 6, 3)
    drawn = torch.rand(1).item(), np.random.random()
    other = split.assign(dataset, 6, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    torch.manual_seed(99)
    np.random.seed(99)
    assert drawn == (torch.rand(1).item(), np.random.random())


@pytest.mark.parametrize("split", SPLITS, ids=repr)
def test_every_split_gives_one_client_everything(split: Split) -> None:
    assert split.assign(make_dataset(7), 1, 0)[0].tolist() == list(range(7))


@pytest.mark.parametrize("split", SPLITS, ids=repr)
def test_every_split_refuses_zero_clients(split: Split) -> None:
    with pytest.raises(ValueError, match="num_clients is 0"):
        split.assign(make_dataset(7), 0, 0)


@given(num_samples=st.integers(1, 200), num_clients=st.integers(1, 50))
def test_iid_sizes_differ_by_at_most_one(num_samples: int, num_clients: int) -> None:
    assume(num_clients <= num_samples)
    sizes = [len(rows) for rows in IID().assign(make_dataset(num_samples), num_clients, 0)]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_is_more_skewed_with_a_smaller_alpha() -> None:
    dataset = make_dataset(5000, num_classes=10)

    def largest_share(alpha: float) -> float:
        rows = Dirichlet(alpha=alpha).assign(dataset, 10, 0)
        counts = np.array(
            [client.label_counts for client in describe(dataset, rows, [str(i) for i in range(10)])]
        )
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert largest_share(0.1) > largest_share(1.0) + 0.1
    # at alpha=1e5 each client has a tenth of each class, give or take rounding to whole samples
    assert largest_share(1e5) < 0.13


def test_dirichlet_shares_of_a_class_have_the_mean_and_variance_of_the_distribution() -> None:
    dataset = Dataset(None, torch.zeros(10_000, dtype=torch.int64))
    alpha, num_clients = 2.0, 4
    shares = np.array(
        [
            [
                len(rows) / 10_000
                for rows in Dirichlet(alpha=alpha, min_samples=1).assign(dataset, num_clients, seed)
            ]
            for seed in range(400)
        ]
    )
    variance = (1 / num_clients) * (1 - 1 / num_clients) / (num_clients * alpha + 1)
    # 400 draws: standard errors are 0.007 for a mean and about 8 % for a variance; allow four
    np.testing.assert_allclose(shares.mean(axis=0), 1 / num_clients, atol=0.03)
    np.testing.assert_allclose(shares.var(axis=0), variance, rtol=0.32)


@settings(max_examples=30, deadline=None)
@given(min_samples=st.integers(1, 40), seed=st.integers(0, 1000))
def test_dirichlet_gives_every_client_its_minimum(min_samples: int, seed: int) -> None:
    rows = Dirichlet(alpha=1.0, min_samples=min_samples).assign(make_dataset(1000), 5, seed)
    assert min(len(part) for part in rows) >= min_samples


def test_dirichlet_says_what_to_change_when_no_draw_is_good_enough() -> None:
    with pytest.raises(
        DataError, match=r"min_samples=40\) left one of 10 clients.*the smallest client had 1 at"
    ):
        Dirichlet(alpha=0.01, min_samples=40).assign(make_dataset(500), 10, 0)
    with pytest.raises(DataError, match="needs 1000 samples for 10 clients but there are 500"):
        Dirichlet(min_samples=100).assign(make_dataset(500), 10, 0)


def test_shards_give_equal_sizes_and_about_as_many_classes_as_shards() -> None:
    dataset = Dataset(None, torch.arange(10).repeat(60))
    rows = Shards(shards_per_client=2).assign(dataset, 10, 0)
    counts = np.array(
        [client.label_counts for client in describe(dataset, rows, [str(i) for i in range(10)])]
    )
    assert counts.sum(axis=1).tolist() == [60] * 10
    assert (counts > 0).sum(axis=1).max() <= 2  # 20 shards over 10 balanced classes: no shard has two classes


@settings(max_examples=50, deadline=None)
@given(num_users=st.integers(1, 40), num_clients=st.integers(1, 10), seed=st.integers(0, 99))
def test_by_user_keeps_users_together_and_clients_balanced(
    num_users: int, num_clients: int, seed: int
) -> None:
    dataset = make_dataset(400, num_users=num_users, seed=seed)
    assert dataset.users is not None
    user_sizes = np.unique(dataset.users.numpy(), return_counts=True)[1]
    assume(len(user_sizes) >= num_clients)
    rows = ByUser().assign(dataset, num_clients, seed)
    users = [set(dataset.users[part].tolist()) for part in rows]
    assert sum(map(len, users)) == len(set.union(*users))
    # largest first to the least loaded: no two clients differ by more than the largest user
    sizes = [len(part) for part in rows]
    assert max(sizes) - min(sizes) <= int(user_sizes.max())


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (IID(), "client 4 would have no samples: IID spreads 4 samples over 6 clients"),
        (Shards(), "client . would have no samples: Shards spreads 4 samples over 6 clients"),
        (ByUser(), "client 2 would have no samples: ByUser with 2 users spreads 4 samples over 6 clients"),
        (Dirichlet(min_samples=1), "needs 6 samples for 6 clients but there are 4"),
    ],
)
def test_a_client_without_data_is_an_error_that_names_it(split: Split, message: str) -> None:
    dataset = Dataset(None, torch.tensor([0, 1, 0, 1]), torch.tensor([1, 1, 2, 2]))
    with pytest.raises(DataError, match=message):
        split.assign(dataset, 6, 0)


@pytest.mark.parametrize("split", [Dirichlet(), Shards()], ids=repr)
@pytest.mark.parametrize("targets", [torch.rand(50), torch.zeros(50, 80, dtype=torch.int64), None])
def test_label_splits_refuse_targets_that_are_not_classes(split: Split, targets: torch.Tensor | None) -> None:
    with pytest.raises(DataError, match="needs one class a sample"):
        split.assign(Dataset(torch.zeros(50, 1), targets), 2, 0)


def test_by_user_refuses_a_data_set_without_users() -> None:
    with pytest.raises(DataError, match="ByUser needs the user of each sample"):
        ByUser().assign(Dataset(torch.zeros(4, 1), None), 2, 0)


@pytest.mark.parametrize(
    ("component", "fields"),
    [
        (Dirichlet, {"alpha": 0.0}),
        (Dirichlet, {"alpha": float("nan")}),
        (Shards, {"shards_per_client": 0}),
        (IID, {"x": 1}),
    ],
)
def test_fields_out_of_range_are_refused(component: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        component(**fields)


def test_describe_counts_samples_by_label() -> None:
    dataset = Dataset(None, torch.tensor([0, 2, 2, 1, 0]), label_names=tuple("abcd"))
    first, second = describe(dataset, [torch.tensor([0, 1, 2]), torch.tensor([3, 4])], ["x", "y"])
    assert (first.name, first.num_samples, first.label_counts) == ("x", 3, (1, 0, 2, 0))
    assert (second.name, second.num_samples, second.label_counts) == ("y", 2, (1, 1, 0, 0))


def test_describe_leaves_label_counts_empty_for_values_and_sequences() -> None:
    rows = [torch.tensor([0, 1])]
    assert describe(Dataset(None, torch.rand(2)), rows, ["x"])[0].label_counts == ()
    assert describe(Dataset(None, torch.zeros(2, 80, dtype=torch.int64)), rows, ["x"])[0].label_counts == ()
    with pytest.raises(ValueError, match="1 assignments but 2 client names"):
        describe(Dataset(None, torch.rand(2)), rows, ["x", "y"])
