"""The contract suite: every aggregator passes it, and broken ones do not. One line for each new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from fedmp.aggregate import (
    Aggregator,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
    WeightedMean,
)
from fedmp.aggregate.contract import check_aggregator

Updates = Sequence[Mapping[str, torch.Tensor]]


class Smallest:
    """The smallest aggregator of a user's own: each element's smallest value."""

    def __repr__(self) -> str:
        return "Smallest()"

    def combine(self, updates: Updates, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        if len(weights) != len(updates) or min(weights) <= 0:
            raise ValueError("weights")
        return {
            name: torch.stack([update[name] for update in updates]).min(dim=0).values for name in updates[0]
        }


@pytest.mark.parametrize(
    ("aggregator", "promises"),
    [
        (WeightedMean(), {"uses_weights": True}),
        (CoordinateMedian(), {"uses_weights": False, "tolerates": 5}),
        (CoordinateMedian(), {"uses_weights": False, "tolerates": 5, "num_clients": 12}),
        (TrimmedMean(), {"uses_weights": False, "tolerates": 3}),
        (TrimmedMean(trim=0.45), {"uses_weights": False, "tolerates": 5}),
        (TrimmedMean(trim=0.0), {"uses_weights": False}),
        (Krum(), {"uses_weights": False, "tolerates": 4}),
        (Krum(num_byzantine=1), {"uses_weights": False, "tolerates": 1}),
        (MultiKrum(), {"uses_weights": False, "tolerates": 4}),
        (MultiKrum(num_byzantine=2, num_selected=3), {"uses_weights": False, "tolerates": 2}),
        (GeometricMedian(), {"uses_weights": False, "tolerates": 4}),
        (GeometricMedian(weighted=True), {"uses_weights": True, "tolerates": 4}),
        (Bulyan(), {"uses_weights": False, "tolerates": 2}),
        (Bulyan(num_byzantine=3), {"uses_weights": False, "tolerates": 3, "num_clients": 16}),
        (NormClipping(), {"uses_weights": False, "is_within_hull": False, "tolerates": 2}),
        (NormClipping(weighted=True), {"uses_weights": True, "is_within_hull": False, "tolerates": 2}),
        (CenteredClipping(), {"uses_weights": False, "tolerates": 4}),
        (Smallest(), {"uses_weights": False}),
    ],
    ids=repr,
)
def test_every_aggregator_keeps_the_contract(aggregator: Aggregator, promises: dict[str, Any]) -> None:
    check_aggregator(aggregator, **promises)
    assert isinstance(aggregator, Aggregator)


class Twisted:
    """Changes what a good aggregator does."""

    def __init__(self, change: str) -> None:
        self.change = change

    def combine(self, updates: Updates, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        if self.change == "reverse":
            weights = weights[::-1]
        if self.change == "first":
            return dict(updates[0])
        if self.change == "hoard":
            updates = [dict(update) for update in updates]
        combined = WeightedMean().combine(updates, weights)
        if self.change == "widen":
            return {name: tensor.double() for name, tensor in combined.items()}
        if self.change == "forget":
            combined.popitem()
        if self.change == "double":
            return {name: (tensor * 2).to(tensor.dtype) for name, tensor in combined.items()}
        return combined


@pytest.mark.parametrize(
    ("change", "promises", "message"),
    [
        ("reverse", {"uses_weights": True}, "order of clients|a tensor at a time"),
        ("first", {"uses_weights": False}, "must raise ValueError"),
        ("hoard", {"uses_weights": True}, "are held"),
        ("widen", {"uses_weights": True}, "must stay torch.float32"),
        ("forget", {"uses_weights": True}, "the result must hold"),
        ("double", {"uses_weights": True}, "equal updates"),
        ("none", {"uses_weights": False}, "depends on weights"),
        ("none", {"uses_weights": True, "tolerates": 1}, "away from the honest mean"),
    ],
)
def test_an_aggregator_that_breaks_a_rule_is_told_which(
    change: str, promises: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_aggregator(Twisted(change), **promises)


def test_krum_does_not_keep_what_it_does_not_promise() -> None:
    """The contract's attack is one that a rule with too small an f, and an average, give way to."""
    with pytest.raises(AssertionError, match="move the result"):
        check_aggregator(MultiKrum(num_byzantine=1), uses_weights=False, tolerates=3)
