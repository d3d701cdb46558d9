"""Which clients take part in a round."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmp.strategy import FedAvg

CLIENTS = [f"c{index}" for index in range(10)]


@settings(max_examples=100, deadline=None)
@given(
    num=st.integers(1, 40),
    fraction=st.floats(0.001, 1.0),
    round=st.integers(1, 99),
    seed=st.integers(0, 2**63),
)
def test_a_cohort_is_so_many_different_clients_in_client_order(
    num: int, fraction: float, round: int, seed: int
) -> None:
    clients = [f"c{index}" for index in range(num)]
    cohort = FedAvg(fraction=fraction).cohort(clients, round=round, seed=seed)
    assert list(cohort) == [client for client in clients if client in set(cohort)]
    assert 1 <= len(cohort) <= num
    assert abs(len(cohort) - fraction * num) < 1 or len(cohort) == 1


@pytest.mark.parametrize(("fraction", "size"), [(1.0, 10), (0.3, 3), (0.31, 4), (0.01, 1), (0.7, 7)])
def test_the_share_is_rounded_up(fraction: float, size: int) -> None:
    assert len(FedAvg(fraction=fraction).cohort(CLIENTS, round=1, seed=0)) == size


def test_the_same_seed_and_round_give_the_same_cohort() -> None:
    strategy = FedAvg(fraction=0.5)
    assert strategy.cohort(CLIENTS, round=4, seed=9) == strategy.cohort(CLIENTS, round=4, seed=9)
    assert len({strategy.cohort(CLIENTS, round=round, seed=9) for round in range(1, 9)}) > 1
    assert len({strategy.cohort(CLIENTS, round=4, seed=seed) for seed in range(8)}) > 1


def test_every_client_is_picked_about_equally_often() -> None:
    strategy = FedAvg(fraction=0.3)
    counts = Counter(c for round in range(1, 1001) for c in strategy.cohort(CLIENTS, round=round, seed=0))
    # 1000 draws with p = 0.3: a standard deviation of 14.5; five of them either way
    assert all(abs(counts[client] - 300) < 73 for client in CLIENTS)


@pytest.mark.parametrize(
    "fields", [{"fraction": 0}, {"fraction": 1.1}, {"local_epochs": 0}, {"local_steps": 0}]
)
def test_values_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        FedAvg(**fields)
