"""What every strategy must keep, as a function that a test of your own strategy can call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedmp.graph import StateSpec
from fedmp.strategy.rules import Contribution, LocalRule, ServerRound, ServerRule, Slots
from fedmp.strategy.selection import ClientFacts, Selection
from fedmp.strategy.strategy import Strategy

__all__ = ["check_selection", "check_strategy"]

_PARAMETERS = ("body.weight", "norm.weight", "norm.bias", "head.weight")
_BUFFERS = ("norm.running_mean",)
_SHAPE = (3, 2)
_CLIENTS = tuple(f"c{index}" for index in range(7))


def check_strategy(strategy: Strategy) -> None:
    """Check that a strategy does what the engines rely on.

    It picks cohorts as it should; its rules treat elements alike, so that stages, whole models and stacked cohorts
    come to the same; they change nothing that is not theirs; they say what state they have; all of it survives
    pickling and a resumed run.

    Args:
        strategy: any object with a strategy's attributes.

    Raises:
        AssertionError: it breaks a rule; the message says which.

    Example:
        >>> from fedmp.strategy import FedProx
        >>> check_strategy(FedProx(mu=0.1))
    """
    assert isinstance(strategy, Strategy), (
        f"{type(strategy).__name__} lacks attributes of a Strategy; inherit from FedAvg, which has them all"
    )
    _check_cohorts(strategy)
    _check_scope(strategy)
    rule, server = strategy.local_rule, strategy.server_rule
    received, kept = (rule.received, rule.kept) if rule else ((), ())
    slots = server.slots if server else ()
    assert set(received) <= set(slots), f"clients receive {received}, but the server rule keeps only {slots}"
    for name in (*received, *kept, *slots):
        assert name.isidentifier(), f"a slot is called {name!r}; use a plain word"
    if rule is not None:
        _check_local_rule(rule)
    _check_server(strategy)


def check_selection(selection: Selection) -> None:
    """Check that a selection picks as many as it should, in client order, the same for the same seed.

    Raises:
        AssertionError: it breaks a rule; the message says which.
    """
    every = [
        ClientFacts(),
        ClientFacts(10, 0.5),
        ClientFacts(3, None, is_available=False),
        ClientFacts(1, 2.0),
    ]
    for count in (1, 2, 7):
        clients = _CLIENTS[:count]
        for facts in ({}, {name: every[i % len(every)] for i, name in enumerate(clients)}):
            for size in range(1, count + 1):
                for round in (1, 2):
                    where = f"{size} of {count} clients, round {round}"
                    chosen = selection.select(clients, size, round=round, seed=3, facts=facts)
                    _check_chosen(chosen, clients, where)
                    assert len(chosen) <= size, f"{where}: {len(chosen)} were picked"
                    again = selection.select(clients, size, round=round, seed=3, facts=facts)
                    assert again == chosen, f"{where}: another choice with the same seed"


def _check_chosen(chosen: Sequence[str], clients: Sequence[str], where: str) -> None:
    assert isinstance(chosen, tuple), f"{where}: give a tuple, not {type(chosen).__name__}"
    assert chosen, f"{where}: nobody was picked"
    assert list(chosen) == [name for name in clients if name in chosen], (
        f"{where}: pick clients once each, in client order, not {chosen}"
    )


def _check_cohorts(strategy: Strategy) -> None:
    for count in (1, 2, 7):
        clients = _CLIENTS[:count]
        for round in (1, 2, 3):
            where = f"{count} clients, round {round}"
            chosen = strategy.cohort(clients, round=round, seed=5)
            _check_chosen(chosen, clients, where)
            assert strategy.cohort(clients, round=round, seed=5) == chosen, (
                f"{where}: another cohort with the same seed"
            )
    updates = _updates(_PARAMETERS, num=3)
    weights = strategy.weights(updates)
    assert len(weights) == 3, f"3 updates need 3 weights, not {weights}"
    assert min(weights) > 0, f"weights must be positive, not {weights}"


def _check_scope(strategy: Strategy) -> None:
    specs = _specs()
    scope = strategy.scope(specs)
    assert pickle.loads(pickle.dumps(scope)) == scope, "the scope changes when it is pickled"
    assert scope.own <= set(specs), f"unknown tensors are kept local: {sorted(scope.own - set(specs))}"
    if scope.fragments:
        dealt = sorted(name for fragment in scope.fragments for name in fragment)
        wanted = sorted(name for name in specs if name not in scope.own)
        assert dealt == wanted, f"each travelling tensor must be in one fragment; {dealt} instead of {wanted}"


def _check_local_rule(rule: LocalRule) -> None:
    assert isinstance(rule, LocalRule), f"{type(rule).__name__} lacks attributes of a LocalRule"
    pickle.loads(pickle.dumps(rule))
    stacked = _LocalCase.drawn((4, *_SHAPE), rule)
    corrected, after = stacked.run(rule)
    assert set(after) == set(rule.kept), f"keep() returned {sorted(after)}, the rule says {rule.kept}"
    _same(corrected, stacked.gradient, "the corrected gradient", values=False)
    for slot, tensor in after.items():
        _same(tensor, stacked.gradient, f"slot {slot!r}", values=False)
    for index in range(4):  # a client alone, and a row of one of its tensors alone
        for where in (index, (index, 1)):
            part_corrected, part_after = stacked.part(where).run(rule)
            what = "correct() and keep() must treat elements alike: a part alone gives"
            _same(part_corrected, corrected[where], f"{what} another gradient")
            for slot, tensor in part_after.items():
                _same(tensor, after[slot][where], f"{what} another {slot!r}")


@dataclass(frozen=True)
class _LocalCase:
    """Arguments of a local rule; `rates` has a number a client, shaped to broadcast."""

    gradient: torch.Tensor
    parameter: torch.Tensor
    start: torch.Tensor
    rates: torch.Tensor
    received: Mapping[str, torch.Tensor]
    kept: Mapping[str, torch.Tensor]

    @classmethod
    def drawn(cls, shape: tuple[int, ...], rule: LocalRule) -> _LocalCase:
        generator = torch.Generator().manual_seed(0)

        def draw() -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        rates = torch.rand((shape[0], 1, 1), generator=generator, dtype=torch.float64) + 0.1
        received, kept = {slot: draw() for slot in rule.received}, {slot: draw() for slot in rule.kept}
        return cls(draw(), draw(), draw(), rates.expand(shape), received, kept)

    def part(self, where: int | tuple[int, int]) -> _LocalCase:
        return _LocalCase(
            self.gradient[where],
            self.parameter[where],
            self.start[where],
            self.rates[where],
            {slot: tensor[where] for slot, tensor in self.received.items()},
            {slot: tensor[where] for slot, tensor in self.kept.items()},
        )

    def run(self, rule: LocalRule) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        before = copy.deepcopy(self)
        corrected = rule.correct(
            self.gradient.clone(), self.parameter, start=self.start, received=self.received, kept=self.kept
        )
        after = rule.keep(
            self.parameter - self.start, received=self.received, kept=self.kept, rate_sum=self.rates
        )
        for name in ("parameter", "start", "received", "kept"):
            ours, theirs = getattr(self, name), getattr(before, name)
            pairs = (
                zip(ours.values(), theirs.values(), strict=True)
                if isinstance(ours, dict)
                else [(ours, theirs)]
            )
            for mine, other in pairs:
                _same(mine, other, f"the rule changed {name!r} in place")
        return corrected, after


def _check_server(strategy: Strategy) -> None:
    """Three steps of the server, over names in one order and the other, and with a break in between."""
    whole, turned = _Server(strategy, _PARAMETERS), _Server(strategy, _PARAMETERS[::-1])
    for _ in range(3):
        whole.step()
        turned.step()
    for name, tensor in whole.weights.items():
        assert bool(torch.isfinite(tensor).all()), f"{name} is not finite after three rounds"
        _same(turned.weights[name], tensor, f"{name}: the order of the tensors matters")
    broken = _Server(strategy, _PARAMETERS)
    broken.step()
    resumed = _Server(strategy, _PARAMETERS)
    resumed.take_over(broken)
    for _ in range(2):
        resumed.step()
    for name, tensor in whole.weights.items():
        _same(resumed.weights[name], tensor, f"{name}: a resumed run comes to something else")


class _Server:
    """A server in a few lines: what the coordinator does with a strategy."""

    def __init__(self, strategy: Strategy, names: Sequence[str]) -> None:
        self._strategy = strategy
        self._names = names
        self._round = 0
        self.weights = {name: nn.Parameter(torch.ones(_SHAPE, dtype=torch.float64)) for name in sorted(names)}
        make = strategy.server_optimizer
        self._optimizer = make(list(self.weights.values())) if make else None
        self._rule = strategy.server_rule
        slots = self._rule.slots if self._rule else ()
        self._slots: Slots = {
            slot: {name: torch.zeros(_SHAPE, dtype=torch.float64) for name in self.weights} for slot in slots
        }

    def take_over(self, other: _Server) -> None:
        self._round = other._round
        for name, weight in other.weights.items():
            self.weights[name].data.copy_(weight.data)
        self._slots = copy.deepcopy(other._slots)
        if self._optimizer is not None and other._optimizer is not None:
            self._optimizer.load_state_dict(copy.deepcopy(other._optimizer.state_dict()))

    def step(self) -> None:
        self._round += 1
        updates = _updates(self._names, num=3, seed=self._round)
        weights = self._strategy.weights(updates)
        update = self._update(self._rule, updates, weights)
        missing = set(self._names) - set(update)
        assert not missing, f"the server rule's update lacks {sorted(missing)}"
        for name, weight in self.weights.items():
            _same(update[name], weight, f"the update of {name}", values=False)
            weight.grad = -update[name]
            if self._optimizer is None:
                weight.data += update[name]
        if self._optimizer is not None:
            self._optimizer.step()

    def _update(
        self, rule: ServerRule | None, updates: Sequence[Contribution], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        if rule is None:
            return _mean(updates, weights)
        before = copy.deepcopy(self._slots)
        update, after = rule.step(
            ServerRound(updates, weights, _mean, frozenset(self._names), self._slots, len(_CLIENTS))
        )
        assert set(after) == set(rule.slots), f"step() returned slots {sorted(after)}, it says {rule.slots}"
        for slot, tensors in before.items():
            for name, tensor in tensors.items():
                _same(self._slots[slot][name], tensor, f"step() changed slot {slot!r} of {name} in place")
                _same(after[slot][name], tensor, f"slot {slot!r} of {name}", values=False)
        self._slots = after
        return update


class _Update(Contribution):
    """An update with a report."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], number: int) -> None:
        self._tensors = tensors
        self._number = number

    @property
    def num_examples(self) -> int:
        return 20 + 10 * self._number

    @property
    def num_samples(self) -> int:
        return 10 + 7 * self._number

    @property
    def num_steps(self) -> int:
        return 2 + self._number

    @property
    def rate_sum(self) -> float:
        return 0.1 * self.num_steps

    @property
    def start_loss(self) -> float | None:
        return 0.5 + self._number

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _updates(names: Sequence[str], *, num: int, seed: int = 0) -> list[_Update]:
    """Random updates of parameters and buffers, whose values do not depend on the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        (number, name): 0.1 * torch.randn(_SHAPE, generator=generator, dtype=torch.float64)
        for number in range(num)
        for name in sorted((*names, *_BUFFERS))
    }
    return [
        _Update({name: drawn[number, name] for name in (*names, *_BUFFERS)}, number) for number in range(num)
    ]


def _mean(updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    assert len(updates) == len(weights), f"{len(updates)} updates are combined with {len(weights)} weights"
    shares = torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)
    return {
        name: torch.stack([share * update[name] for share, update in zip(shares, updates, strict=True)]).sum(
            0
        )
        for name in updates[0]
    }


def _specs() -> dict[str, StateSpec]:
    kinds = {**dict.fromkeys(_PARAMETERS, "parameter"), **dict.fromkeys(_BUFFERS, "buffer")}
    return {
        name: StateSpec(name, (name,), _SHAPE, torch.float64, kind, True, kind == "parameter")  # type: ignore[arg-type]
        for name, kind in kinds.items()
    }


def _same(actual: torch.Tensor, expected: torch.Tensor, message: str, *, values: bool = True) -> None:
    """Equal shape and dtype, and values up to the last digits of float64."""
    assert actual.shape == expected.shape, (
        f"{message}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{message}: dtype {actual.dtype}, not {expected.dtype}"
    if values:
        difference = float((actual - expected).detach().abs().max()) if actual.numel() else 0.0
        assert difference <= 1e-12, f"{message} (differs by {difference:g})"
