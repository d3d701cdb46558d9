"""The global model between rounds: its tensors, and the server optimizer that moves them.

The aggregated update of a round is a difference to the global model. Its negative is the
pseudo-gradient (Reddi et al., 2021, Adaptive Federated Optimization, algorithm 1), which any
`torch.optim.Optimizer` may follow; plain SGD with learning rate 1 is federated averaging. Buffers take
the averaged update as it is. A strategy may have a rule of its own to make one update of many, with state
for each parameter, of which it may hand some out to the clients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedmp.coordinator.received import ReceivedModel
from fedmp.errors import ResumeError
from fedmp.graph import StateSpec
from fedmp.strategy import Combine, Contribution, ServerRound, ServerRule, Slots, received_name
from fedmp.updates import Channel, apply_update

__all__ = ["GlobalModel", "OptimizerFactory"]

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]

_RECEIVED = "received/"


class GlobalModel:
    """The coordinator's copy of the model's tensors.

    Args:
        specs: of every tensor, by canonical name.
        state: the tensors; taken over, not copied.
        optimizer: makes the server optimizer of a list of parameters; None for federated averaging.
        rule: makes one update of the clients'; None leaves it to the aggregator.
        received: slots of the rule that clients are handed with the parameters.
        own: names of tensors that stay at the clients.
        downlink: how the model travels to the clients; None as it is.

    Raises:
        ValueError: clients are to be handed what the rule does not keep.
    """

    def __init__(
        self,
        specs: Mapping[str, StateSpec],
        state: Mapping[str, torch.Tensor],
        optimizer: OptimizerFactory | None = None,
        *,
        rule: ServerRule | None = None,
        received: Sequence[str] = (),
        own: Collection[str] = (),
        downlink: Channel | None = None,
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

        self._rule = rule
        self._received = tuple(received)
        self._shared = frozenset(self._parameters) - frozenset(own)
        slots = rule.slots if rule else ()
        if not set(self._received) <= set(slots):
            raise ValueError(
                f"clients are to receive the slots {self._received}, but the server keeps {slots}"
            )
        self._slots: Slots = {
            slot: {name: torch.zeros_like(self.state[name]) for name in sorted(self._shared)}
            for slot in slots
        }
        keeps = downlink is not None and downlink.chain.keeps_estimate
        self._received_model = ReceivedModel(downlink, self.state) if downlink is not None and keeps else None

    def open(self, round: int) -> None:
        """A round is about to begin with the present model."""
        if self._received_model is not None:
            self._received_model.open(round, self.state)

    def difference(self, round: int, held: int) -> Mapping[str, torch.Tensor] | None:
        """What leads a client that holds one round's model to another's, as it travels.

        Args:
            round: whose model the client shall have.
            held: whose it has; 0 for none.

        Returns:
            The payload, of all that differs; None where the client needs the whole model.
        """
        return self._received_model.difference(round, held) if self._received_model is not None else None

    @property
    def handed_out(self) -> dict[str, torch.Tensor]:
        """What clients may pull: the model's tensors, and slots of the server's under names of their own.

        Where clients are sent differences, the tensors are those that clients end with in the open round.
        """
        slots = {
            received_name(slot, name): tensor
            for slot in self._received
            for name, tensor in self._slots[slot].items()
        }
        received = self._received_model.tensors if self._received_model is not None else {}
        return {**self.state, **received, **slots}

    def step(
        self,
        updates: Sequence[Contribution],
        weights: Sequence[float],
        *,
        combine: Combine,
        num_clients: int,
    ) -> None:
        """Make one server step with the clients' updates.

        Args:
            updates, weights: of the clients that finished, in client order.
            combine: the job's aggregator.
            num_clients: of the whole job.
        """
        if self._rule is None:
            self.apply(combine(updates, weights))
            return
        update, self._slots = self._rule.step(
            ServerRound(updates, weights, combine, self._shared, self._slots, num_clients)
        )
        self.apply(update)

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
        mine = self.state[name]
        if change.dtype == mine.dtype and mine.dtype != torch.bool:
            mine.add_(change)  # in place: one tensor may be most of the model
        else:
            mine.copy_(apply_update({name: mine}, {name: change})[name])

    @property
    def slots(self) -> dict[str, torch.Tensor]:
        """The rule's state, by the names under which clients would receive it, and what clients last received."""
        received = self._received_model.kept if self._received_model is not None else {}
        return {
            **{_RECEIVED + name: tensor for name, tensor in received.items()},
            **self._rule_slots(),
        }

    def _rule_slots(self) -> dict[str, torch.Tensor]:
        return {
            received_name(slot, name): tensor
            for slot, tensors in self._slots.items()
            for name, tensor in tensors.items()
        }

    def load_slots(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `slots` returned.

        Raises:
            ResumeError: it is another rule's, or clients received the model in another way.
        """
        received = {n.removeprefix(_RECEIVED): t for n, t in tensors.items() if n.startswith(_RECEIVED)}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_RECEIVED)}
        fits = self._received_model.load(received) if self._received_model is not None else not received
        if not fits:
            raise ResumeError(
                f"the checkpoint {'has' if received else 'has not'} what clients received as differences, and downlink "
                f"{'has no' if received else 'has'} ef21; resume with the config that the run began with"
            )
        if tensors.keys() != self._rule_slots().keys():
            kept = sorted({name.split("/", 1)[0] for name in tensors}) or "none"
            raise ResumeError(
                f"the checkpoint has state of the slots {kept}, the strategy keeps {sorted(self._slots) or 'none'}; "
                f"resume with the config that the run began with"
            )
        self._slots = {
            slot: {name: tensors[received_name(slot, name)] for name in own}
            for slot, own in self._slots.items()
        }

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
