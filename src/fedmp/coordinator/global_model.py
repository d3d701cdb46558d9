"""The global model between rounds: its tensors, and the server optimizer that moves them.

The aggregated update of a round is a difference to the global model. Its negative is the
pseudo-gradient (Reddi et al., 2021, Adaptive Federated Optimization, algorithm 1), which any
`torch.optim.Optimizer` may follow; plain SGD with learning rate 1 is federated averaging. Buffers take
the averaged update as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedmp.graph import StateSpec
from fedmp.updates import apply_update

__all__ = ["GlobalModel", "OptimizerFactory"]

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


class GlobalModel:
    """The coordinator's copy of the model's tensors.

    Args:
        specs: of every tensor, by canonical name.
        state: the tensors; taken over, not copied.
        optimizer: makes the server optimizer of a list of parameters; None for federated averaging.
    """

    def __init__(
        self,
        specs: Mapping[str, StateSpec],
        state: Mapping[str, torch.Tensor],
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        self.specs = specs
        self.state = {name: tensor.detach() for name, tensor in state.items()}
        self._parameters = {
            name: nn.Parameter(self.state[name], requires_grad=True)
            for name, spec in specs.items()
            if spec.kind == "parameter" and spec.requires_grad
        }
        self._optimizer = (
            optimizer(list(self._parameters.values())) if optimizer and self._parameters else None
        )

    def apply(self, update: Mapping[str, torch.Tensor]) -> None:
        """Make one server step with an aggregated update, which may lack tensors (buffers kept local)."""
        if self._optimizer is None:
            for name, change in update.items():  # one at a time: a second whole model would not be small
                self._move(name, change)
            return
        for name, change in update.items():
            if name in self._parameters:
                self._parameters[name].grad = -change
            else:
                self._move(name, change)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _move(self, name: str, change: torch.Tensor) -> None:
        self.state[name].copy_(apply_update({name: self.state[name]}, {name: change})[name])

    @property
    def optimizer_name(self) -> str:
        """The server optimizer's class; empty for plain averaging."""
        return type(self._optimizer).__name__ if self._optimizer is not None else ""

    def optimizer_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The server optimizer's state: tensors by "parameter/key", and plain values alike."""
        tensors: dict[str, torch.Tensor] = {}
        values: dict[str, Any] = {}
        if self._optimizer is not None:
            for name, parameter in self._parameters.items():
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"{name}/{key}"] = value
                    else:
                        values[f"{name}/{key}"] = value
        return tensors, values

    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `optimizer_state` returned."""
        if self._optimizer is None:
            return
        for entry, value in (*tensors.items(), *values.items()):
            name, key = entry.rsplit("/", 1)
            self._optimizer.state[self._parameters[name]][key] = value
