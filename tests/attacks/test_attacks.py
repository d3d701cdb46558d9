"""What attackers send, against the papers' equations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from fedmp import FedmpError
from fedmp.attacks import ALittleIsEnough, Attack, Gaussian, LabelFlip, MinMax, Scaling, SignFlip
from fedmp.config import config_dir, load_config
from fedmp.data import Dataset

ALL = [SignFlip(), Scaling(), Gaussian(), LabelFlip(), ALittleIsEnough(), MinMax()]
NAMES = [f"c{index}" for index in range(20)]


def updates(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": 1 + torch.randn(30, 4, generator=generator),
            "b": torch.randn(7, generator=generator).to(torch.bfloat16),
            "n": torch.tensor(3),
        }
        for _ in range(count)
    ]


OWN, HONEST = updates(2, 0), updates(8, 1)


def matrix(of: Sequence[dict[str, torch.Tensor]]) -> np.ndarray:
    return torch.stack([update["w"].flatten() for update in of]).double().numpy()


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_forged_updates_look_like_updates(attack: Attack) -> None:
    for honest in (HONEST, []):
        forged = attack.forge(OWN, honest, seed=1)
        assert len(forged) == len(OWN)
        for update in forged:
            assert {name: (t.dtype, t.shape) for name, t in update.items()} == {
                name: (t.dtype, t.shape) for name, t in OWN[0].items()
            }
            assert all(bool(torch.isfinite(tensor).all()) for tensor in update.values())
            assert update["n"] == 3
    assert attack.forge([], HONEST, seed=1) == []


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_the_same_seed_forges_the_same(attack: Attack) -> None:
    once, again = attack.forge(OWN, HONEST, seed=5), attack.forge(OWN, HONEST, seed=5)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(once, again, strict=True) for name in a)


def test_attackers_are_a_share_of_the_clients_in_client_order() -> None:
    chosen = SignFlip(share=0.2).attackers(NAMES, seed=3)
    assert len(chosen) == 4
    assert list(chosen) == [name for name in NAMES if name in chosen]
    assert chosen == SignFlip(share=0.2).attackers(NAMES, seed=3)
    assert len({SignFlip(share=0.2).attackers(NAMES, seed=seed) for seed in range(5)}) > 1
    assert SignFlip(share=0).attackers(NAMES, seed=3) == ()


def test_attackers_may_be_named() -> None:
    assert MinMax(clients=("c7", "c2")).attackers(NAMES, seed=0) == ("c2", "c7")
    with pytest.raises(FedmpError, match="no clients called c99"):
        MinMax(clients=("c99",)).attackers(NAMES, seed=0)


def test_sign_flip_and_scaling_multiply() -> None:
    for attack, factor in ((SignFlip(scale=3), -3), (Scaling(scale=7), 7)):
        for update, own in zip(attack.forge(OWN, HONEST, seed=0), OWN, strict=True):
            torch.testing.assert_close(update["w"], factor * own["w"])


def test_what_is_too_large_stays_finite() -> None:
    forged = Scaling(scale=1e30).forge([{"w": torch.tensor([1e20, -1e20])}], [], seed=0)[0]["w"]
    assert forged.tolist() == [torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]


def test_noise_is_as_large_as_said_and_each_attackers_own() -> None:
    own = [{"w": torch.full((100, 100), 0.5)} for _ in range(2)]
    first, second = (update["w"] for update in Gaussian(scale=10).forge(own, [], seed=0))
    # 10,000 draws: the standard deviation of their standard deviation is 0.7 %
    assert abs(first.std().item() - 5.0) < 0.2
    assert abs(first.mean().item()) < 0.2
    assert not torch.equal(first, second)


def test_labels_are_flipped_end_to_end() -> None:
    data = Dataset(torch.zeros(3, 2), torch.tensor([0, 4, 9]), label_names=tuple("0123456789"))
    poisoned = LabelFlip().poison(data)
    assert poisoned.targets is not None
    assert poisoned.targets.tolist() == [9, 5, 0]
    with pytest.raises(FedmpError, match="needs classes"):
        LabelFlip().poison(Dataset(torch.zeros(3, 2), torch.zeros(3)))


def test_a_little_is_the_honest_mean_less_some_deviations() -> None:
    honest = matrix(HONEST)
    expected = honest.mean(axis=0) - 1.5 * honest.std(axis=0, ddof=1)
    for update in ALittleIsEnough().forge(OWN, HONEST, seed=0):
        np.testing.assert_allclose(update["w"].flatten().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("num_attackers", "num_honest", "z"), [(12, 38, 0.3360), (2, 8, 0.0), (24, 26, 1.4261)]
)
def test_the_largest_z_is_the_papers(num_attackers: int, num_honest: int, z: float) -> None:
    """n = 50, m = 12: s = 14, so Phi(z) = 24 / 38; n = 50, m = 24: s = 2, so Phi(z) = 24 / 26."""
    forged = ALittleIsEnough(z=None).forge(updates(num_attackers, 2), updates(num_honest, 3), seed=0)[0]["w"]
    honest = matrix(updates(num_honest, 3))
    found = (honest.mean(axis=0) - forged.flatten().double().numpy()) / honest.std(axis=0, ddof=1)
    np.testing.assert_allclose(found, z, atol=1e-3)


@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_min_max_goes_as_far_as_the_honest_spread_hides_and_no_further(direction: str) -> None:
    honest = [{"w": update["w"]} for update in HONEST]
    forged = matrix(MinMax(direction=direction).forge(honest[:1], honest, seed=0))[0]
    rows = matrix(honest)
    limit = max(np.linalg.norm(a - b) for a in rows for b in rows)
    farthest = max(np.linalg.norm(forged - row) for row in rows)
    assert farthest == pytest.approx(limit, rel=1e-5)
    step = forged - rows.mean(axis=0)
    towards = {"std": rows.std(axis=0), "unit": rows.mean(axis=0), "sign": np.sign(rows.mean(axis=0))}[
        direction
    ]
    assert step @ towards == pytest.approx(-np.linalg.norm(step) * np.linalg.norm(towards), rel=1e-5)


@pytest.mark.parametrize("choice", sorted(path.stem for path in (config_dir() / "attack").glob("*.yaml")))
def test_every_choice_of_the_config_is_an_attack(choice: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base=None):
        job = load_config(compose("config", [f"attack={choice}"])).job()
    assert (job.attack is None) == (choice == "none")
    assert job.attack is None or isinstance(job.attack, Attack)
