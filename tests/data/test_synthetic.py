"""The published generator of unlike clients."""

from __future__ import annotations

import torch

from fedmp.data import Synthetic


def test_every_user_has_samples_of_its_own_to_train_and_to_test_on() -> None:
    data = Synthetic(num_users=5, most_samples=80).load()
    for part in (data.train, data.test):
        assert part.users is not None
        assert part.users.unique().tolist() == [0, 1, 2, 3, 4]
    counts = data.train.users.bincount() + data.test.users.bincount()  # type: ignore[union-attr]
    assert 50 <= int(counts.min()) <= int(counts.max()) <= 80


def test_the_same_seed_draws_the_same_and_another_draws_others() -> None:
    first, again, other = (
        Synthetic(num_users=3, most_samples=60, seed=seed).load().train for seed in (1, 1, 2)
    )
    assert torch.equal(first.inputs, again.inputs)  # type: ignore[arg-type]
    assert not torch.equal(first.inputs[:40], other.inputs[:40])  # type: ignore[index]


def test_beta_spreads_the_users_inputs_and_alpha_their_models() -> None:
    def spread(beta: float) -> float:
        train = Synthetic(num_users=40, beta=beta, most_samples=60).load().train
        assert train.inputs is not None
        means = torch.stack([train.inputs[train.users == user].mean() for user in range(40)])
        return float(means.std())

    assert spread(5.0) > 5 * spread(0.0)


def test_alike_users_have_alike_labels() -> None:
    def largest_share(source: Synthetic) -> float:
        train = source.load().train
        assert train.targets is not None
        shares = [torch.bincount(train.targets[train.users == u]).double() for u in range(20)]
        return sum(float(counts.max() / counts.sum()) for counts in shares) / 20

    alike = largest_share(Synthetic(num_users=20, iid=True, most_samples=200))
    unlike = largest_share(Synthetic(num_users=20, most_samples=200))
    assert unlike > alike + 0.1
