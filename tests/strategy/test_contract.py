"""The contract suite: every strategy and selection keeps it, and broken ones do not. One line for each new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fedmp import strategy as s
from fedmp.strategy import FedAvg, LocalRule, Selection, Strategy, check_selection, check_strategy
from fedmp.strategy.fedprox import Proximal
from fedmp.strategy.scaffold import ControlVariates, MeanControl

STRATEGIES = [
    FedAvg(),
    FedAvg(fraction=0.4, effort=s.Stragglers(fraction=0.5, drop=True), selection=s.Weighted()),
    FedAvg(keep_local=("head.*",), keep_statistics_local=True),
    s.FedAvgM(),
    s.FedAdagrad(),
    s.FedAdam(),
    s.FedYogi(),
    s.FedProx(mu=0.1),
    s.Scaffold(),
    s.FedNova(),
    s.FedDyn(),
    s.QFedAvg(),
    s.QFedAvg(q=0),
    s.DiLoCo(),
    s.StreamingDiLoCo(),
    s.FedNova(mu=0.1),
    s.StreamingDiLoCo(fragments=2, strided=False, overlap=False),
    s.FedBN(),
    s.FedBuff(buffer_size=2),
]
SELECTIONS = [
    s.Uniform(),
    s.Weighted(),
    s.PowerOfChoice(num_candidates=3),
    s.Available(),
    s.Available(among=s.PowerOfChoice()),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_every_strategy_keeps_the_contract(strategy: Strategy) -> None:
    check_strategy(strategy)


@pytest.mark.parametrize("selection", SELECTIONS, ids=repr)
def test_every_selection_keeps_the_contract(selection: Selection) -> None:
    check_selection(selection)
    assert isinstance(selection, Selection)


@dataclass(frozen=True)
class Normalised(Proximal):
    """Sums over a tensor, which a device does not have all of."""

    def correct(self, gradient: torch.Tensor, parameter: torch.Tensor, **_: Any) -> torch.Tensor:
        return gradient / gradient.norm()


@dataclass(frozen=True)
class InPlace(Proximal):
    """Changes what is not its own."""

    def correct(self, gradient: torch.Tensor, parameter: torch.Tensor, **_: Any) -> torch.Tensor:
        parameter.mul_(2)
        return gradient


@dataclass(frozen=True)
class Forgetful(ControlVariates):
    """Says that it keeps a slot, and does not."""

    def keep(self, change: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {}


class Twisted(s.Scaffold):
    """Scaffold with one thing changed."""

    change: Any

    @property
    def local_rule(self) -> LocalRule | None:
        return self.change if isinstance(self.change, LocalRule) else super().local_rule

    @property
    def server_rule(self) -> Any:
        return self.change if isinstance(self.change, MeanControl) else super().server_rule

    def cohort(self, clients: Sequence[str], **_: Any) -> tuple[str, ...]:
        return tuple(reversed(clients)) if self.change == "reverse" else tuple(clients)

    def weights(self, updates: Sequence[Mapping[str, torch.Tensor]]) -> list[float]:
        return [0.0] * len(updates) if self.change == "weightless" else [1.0] * len(updates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("reverse", "in client order"),
        ("weightless", "must be positive"),
        (Normalised(0.1), "treat elements alike"),
        (InPlace(0.1), "changed 'parameter' in place"),
        (Forgetful(), "keep\\(\\) returned \\[\\]"),
        (replace(ControlVariates(), received=("mystery",)), "the server rule keeps only"),
        (replace(MeanControl(), slots=("control", "spare")), "step\\(\\) returned slots"),
    ],
    ids=["order", "weights", "norm", "in place", "forgets", "unknown slot", "slots"],
)
def test_a_strategy_that_breaks_a_rule_is_told_which(change: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_strategy(Twisted(change=change))
