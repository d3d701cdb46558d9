"""The bytes that transforms save on real data without costing accuracy; figures in docs/compression.md."""

from __future__ import annotations

from functools import cache

import pytest
from benchmarks.communication import METHODS, SETTINGS, reached, run, target_of

from fedmp.data import FashionMNIST
from fedmp.errors import DataError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CHAIN = "lowrank 16, int4, zstd"


@pytest.fixture(autouse=True)
def _needs_fashion_mnist() -> None:
    try:
        FashionMNIST().load()
    except DataError as error:
        pytest.skip(f"Fashion-MNIST is not here: {error}")


@cache
def rows(name: str, seed: int) -> list[dict[str, float]]:
    method = next(method for method in METHODS if method.name == name)
    until = 1.0 if name == "plain" else target(seed)
    return run(SETTINGS["fashion"], method, seed=seed, until=until)


def target(seed: int) -> float:
    return target_of({"plain": {"rows": rows("plain", seed)}})


def bytes_up(name: str, seed: int) -> float:
    """Until the target, which is half a point below what plain averaging ends with."""
    first = reached(rows(name, seed), target(seed))
    assert first is not None, (
        f"{name} ends with {rows(name, seed)[-1]['accuracy']:.4f}; the target is {target(seed):.4f}"
    )
    return rows(name, seed)[first]["bytes_up"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_chain_uploads_thirty_times_less_than_plain_averaging(seed: int) -> None:
    assert bytes_up("plain", seed) >= 30 * bytes_up(CHAIN, seed)


@pytest.mark.parametrize("seed", [0, 1])  # in the third, data parallelism does not reach the target
def test_a_chain_uploads_five_hundred_times_less_than_data_parallelism(seed: int) -> None:
    assert bytes_up("data parallel", seed) >= 500 * bytes_up(CHAIN, seed)
