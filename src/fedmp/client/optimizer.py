"""The client optimizer at work on a device's parameters for one round: its rate, a strategy's rule, its state."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from fedmp.client.state import ClientState
from fedmp.client.work import LocalWork
from fedmp.learning_rate import RateSum
from fedmp.strategy import LocalRule, kept_name, received_name

__all__ = ["LocalOptimizer", "NamedParameters"]

NamedParameters: TypeAlias = Sequence[tuple[str, torch.nn.Parameter]]

_MOMENTS, _NUMBERS = "optimizer", "optimizer-number"


class LocalOptimizer:
    """Makes the steps of one round.

    Args:
        work: of the round.
        parameters: that it trains, as the round begins; may be none.
        pulled: what the coordinator handed out, for the rule.
        state: what the client kept of earlier rounds.
    """

    def __init__(
        self,
        work: LocalWork,
        parameters: NamedParameters,
        *,
        pulled: Mapping[str, torch.Tensor],
        state: ClientState,
    ) -> None:
        self._work = work
        self._parameters = parameters
        self._optimizer = work.optimizer([p for _, p in parameters]) if parameters else None
        shared = [(name, p) for name, p in parameters if name not in work.scope.own]
        self._rule = _RuleAtWork(work.rule, shared, pulled, state) if work.rule else None
        self._rates = [group["lr"] for group in self._optimizer.param_groups] if self._optimizer else []
        self._rate_sum = RateSum(self._optimizer.param_groups[0] if self._optimizer else {"lr": 0.0})
        if self._optimizer and work.keeps_optimizer:
            _load_moments(self._optimizer, parameters, state)

    @property
    def rate_sum(self) -> float:
        """The sum of the coefficients of the gradients in the change so far; 0 where nothing is trained."""
        return self._rate_sum.total

    def zero_grad(self) -> None:
        """Forget the gradients."""
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)

    def step(self, progress: float) -> None:
        """Make a step with the gradients, which must be complete.

        Args:
            progress: of the run, from 0 to 1, for the learning rate.
        """
        if self._optimizer is None:
            return
        factor = self._work.learning_rate.factor(progress)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        if self._rule is not None:
            self._rule.correct()
        self._optimizer.step()
        self._rate_sum.add(self._optimizer.param_groups[0]["lr"])

    def kept(self) -> dict[str, torch.Tensor]:
        """What the client keeps after the round, by state name."""
        kept = self._rule.keep(self.rate_sum) if self._rule else {}
        if self._optimizer and self._work.keeps_optimizer:
            kept.update(_moments(self._optimizer, self._parameters))
        return kept


class _RuleAtWork:
    """A strategy's rule with the tensors of one round."""

    def __init__(
        self,
        rule: LocalRule,
        parameters: NamedParameters,
        pulled: Mapping[str, torch.Tensor],
        state: ClientState,
    ) -> None:
        self._rule = rule
        self._parameters = parameters
        self._start = {name: parameter.detach().clone() for name, parameter in parameters}
        self._received = {
            name: {slot: pulled[received_name(slot, name)].to(p.device) for slot in rule.received}
            for name, p in parameters
        }
        self._kept = {
            name: {slot: _kept(state, slot, name, p) for slot in rule.kept} for name, p in parameters
        }

    @torch.no_grad()
    def correct(self) -> None:
        """Correct the gradients."""
        for name, parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad = self._rule.correct(
                    parameter.grad,
                    parameter.detach(),
                    start=self._start[name],
                    received=self._received[name],
                    kept=self._kept[name],
                )

    @torch.no_grad()
    def keep(self, rate_sum: float) -> dict[str, torch.Tensor]:
        """What the client keeps after the round, by state name."""
        state = {}
        for name, parameter in self._parameters:
            slots = self._rule.keep(
                parameter.detach() - self._start[name],
                received=self._received[name],
                kept=self._kept[name],
                rate_sum=rate_sum,
            )
            state.update({kept_name(slot, name): tensor for slot, tensor in slots.items()})
        return state


def _kept(state: ClientState, slot: str, name: str, parameter: torch.Tensor) -> torch.Tensor:
    tensor = state.get(kept_name(slot, name))
    return torch.zeros_like(parameter) if tensor is None else tensor.to(parameter.device)


def _moments(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, torch.Tensor]:
    """An optimizer's state of each parameter, by state name."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                state[f"{_MOMENTS}/{key}/{name}"] = value.detach().clone()
            elif isinstance(value, int | float):
                state[f"{_NUMBERS}/{key}/{name}"] = torch.tensor(value, dtype=torch.float64)
    return state


def _load_moments(optimizer: torch.optim.Optimizer, parameters: NamedParameters, state: ClientState) -> None:
    """Put back what `_moments` returned, as far as it is there."""
    entries: dict[str, dict[str, Any]] = {name: {} for name, _ in parameters}
    for full, tensor in state.items():
        kind, _, rest = full.partition("/")
        key, _, name = rest.partition("/")
        if kind in (_MOMENTS, _NUMBERS) and name in entries:
            entries[name][key] = tensor if kind == _MOMENTS else float(tensor)
    if any(entries.values()):
        numbers = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
        plain = optimizer.state_dict()
        plain["state"] = {numbers[id(p)]: copy.deepcopy(entries[name]) for name, p in parameters}
        optimizer.load_state_dict(plain)  # puts each tensor where its parameter is
