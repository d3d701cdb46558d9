"""The bytes that transforms save on real data without costing accuracy; figures in docs/compression.md."""

from __future__ import annotations

from functools import cache

import pytest
from benchmarks.communication import METHODS, SETTINGS, reached, run, target_of

from fedmp.data import FashionMNIST
from fedmp.errors import DataError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CHAINS = ("lowrank 8, int4, zstd", "lowrank 16, int4, zstd")


@pytest.fixture(autouse=True)
def _needs_fashion_mnist() -> None:
    try:
        FashionMNIST().load()
    except DataError as error:
        pytest.skip(f"Fashion-MNIST is not here: {error}")


@cache
def rows(name: str) -> list[dict[str, float]]:
    method = next(method for method in METHODS if method.name == name)
    until = 1.0 if name == "plain" else target()
    return run(SETTINGS["fashion"], method, seed=0, until=until)


def target() -> float:
    return target_of({"plain": {"rows": rows("plain")}})


def bytes_up(name: str) -> float:
    """Until the target, which is half a point below what plain averaging ends with."""
    first = reached(rows(name), target())
    assert first is not None, (
        f"{name} ends with {rows(name)[-1]['accuracy']:.4f}; the target is {target():.4f}"
    )
    return rows(name)[first]["bytes_up"]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_uploads_thirty_times_less_than_plain_averaging(chain: str) -> None:
    assert bytes_up("plain") >= 30 * bytes_up(chain)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_uploads_five_hundred_times_less_than_data_parallelism(chain: str) -> None:
    assert bytes_up("data parallel") >= 500 * bytes_up(chain)
