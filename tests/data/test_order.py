"""The order of a client's batches: SplitMix64's numbers, whoever draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmp.data.order import client_streams, one_pass, passes
from fedmp.seeds import derive_seed

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def mixed(state: int) -> int:
    """Figure 16 of the paper, in Python's whole numbers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def test_the_reference_generator_gives_its_published_numbers() -> None:
    found = [mixed(1234567 + number * GAMMA & MASK) for number in (1, 2, 3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    client=st.text("abc-09", min_size=1),
    round=st.integers(1, 10**6),
    epoch=st.integers(0, 50),
    num_samples=st.integers(1, 40),
)
def test_an_order_is_that_of_the_numbers_of_its_stream(
    seed: int, client: str, round: int, epoch: int, num_samples: int
) -> None:
    stream = mixed(derive_seed(seed, "batches", client) + round * GAMMA & MASK)
    begin = mixed(stream + epoch * GAMMA & MASK)
    numbers = [mixed(begin + number * GAMMA & MASK) for number in range(1, num_samples + 1)]
    expected = sorted(range(num_samples), key=numbers.__getitem__)
    found = one_pass(num_samples, seed=seed, client=client, round=round, epoch=epoch)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_many_clients_orders_are_those_of_each_alone() -> None:
    clients = [f"c{i}" for i in range(20)]
    streams = client_streams(clients, seed=7, round=3)
    found = passes(streams.repeat(2), np.tile([0, 1], 20), 11)
    for place, client in enumerate(clients):
        for epoch in (0, 1):
            alone = one_pass(11, seed=7, client=client, round=3, epoch=epoch)
            assert found[2 * place + epoch].tolist() == alone.tolist()


@pytest.mark.parametrize("vary", ["client", "round", "epoch"])
def test_every_sample_is_as_often_at_every_place(vary: str) -> None:
    """Over clients, rounds or epochs alone: a chi-squared statistic of 25 cells, within its 99.99 % range."""
    given = {"client": "c0", "round": 1, "epoch": 0}
    counts = torch.zeros(5, 5)
    for number in range(5000):
        varied = {**given, vary: f"c{number}" if vary == "client" else number + 1}
        counts[torch.arange(5), one_pass(5, seed=0, **varied)] += 1  # type: ignore[arg-type]
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 57.4  # 5/4 of one with 16 degrees of freedom
