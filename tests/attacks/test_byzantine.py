"""A fifth of the clients attacks, on real data: the mean collapses, robust rules keep within three points."""

from __future__ import annotations

from functools import cache

import pytest
from benchmarks.byzantine import AGGREGATORS, ATTACKS, MARGIN, SETTINGS, accuracy

CRUDE = ("sign_flip", "scaling", "gaussian")


@cache
def found(aggregator: str, attack: str, setting: str = "iid") -> float:
    return accuracy(AGGREGATORS[aggregator], ATTACKS[attack], SETTINGS[setting], 0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("attack", CRUDE)
def test_the_mean_collapses(attack: str) -> None:
    assert found("mean", attack) < found("mean", "none") - 0.2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "none"])
@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean", "multi_krum", "geometric_median"])
def test_robust_rules_hold(aggregator: str, attack: str) -> None:
    assert found(aggregator, attack) >= found("mean", "none") - MARGIN


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "none"])
def test_multi_krum_holds_where_clients_are_unlike(attack: str) -> None:
    assert found("multi_krum", attack, "dirichlet") >= found("mean", "none", "dirichlet") - MARGIN
