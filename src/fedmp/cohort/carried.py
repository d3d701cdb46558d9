"""What the clients of a chunk carry from round to round: a rule's slots, an optimizer's moments, values of their own.

It comes from a `Memory` when a chunk begins and goes back when the chunk is done, under the names and with the values
of a client that trains alone (`fedmp.client.state`), so that either way of training can go on where the other left off.

Shape letters: K clients of a chunk, P trained parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from fedmp.cohort.module import ByParameter, StackedModule
from fedmp.cohort.start import RoundStart
from fedmp.strategy import kept_name

if TYPE_CHECKING:
    from fedmp.cohort.chunk import ChunkWork

__all__ = ["Carried", "Memory"]


class Memory(Protocol):
    """Where clients' states are between rounds; used by several threads, each for clients of its own."""

    def load(self, client: str) -> Mapping[str, torch.Tensor]:
        """What a client kept and can use; empty for nothing."""
        ...

    def save(self, client: str, state: Mapping[str, torch.Tensor]) -> None:
        """Keep what a client's round left."""
        ...


class Carried:
    """The states of a chunk's clients, stacked.

    Args:
        module: of the chunk, whose parameters and optimizer state are used.
        work: what its clients do.

    Attributes:
        kept: the rule's tensors, by slot.
    """

    def __init__(self, module: StackedModule, work: ChunkWork) -> None:
        self._module, self._work = module, work
        slots = work.rule.kept if work.rule else ()
        num_clients, dtype = len(module.parameters.parts[0]), module.parameters.flat.dtype
        self.kept = {slot: ByParameter(module.layout, num_clients, dtype) for slot in slots}
        self._steps = torch.zeros(num_clients, 1, dtype=torch.float64)
        self._names = [name for name in module.layout.names if name not in work.own]

    def begin(self, states: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Take the clients' states over; the module holds the global model already."""
        held = [*self.kept.values(), *(self._module.state if self._work.keeps_optimizer else ())]
        for own in held:
            own.clear(len(states))
        self._steps.zero_()
        for place, state in enumerate(states):
            self._begin_client(place, state)

    def steps(self, active: int, step: int) -> int | torch.Tensor:
        """Steps that the first clients' optimizers made before `step` of this round: one for all, or [K, 1]."""
        before = self._steps[:active]
        first = int(before[0, 0])
        return first + step if bool((before == first).all()) else before + step

    def end(
        self, num_steps: Sequence[int], rate_sums: torch.Tensor, start: RoundStart
    ) -> list[dict[str, torch.Tensor]]:
        """What each client keeps after its round.

        Args:
            num_steps: that each one made.
            rate_sums: [K] of these.
            start: of the round.
        """
        states: list[dict[str, torch.Tensor]] = [{} for _ in num_steps]
        for name in self._names if self.kept else ():
            for slot, part in self._after(name, rate_sums, start).items():
                self._deal(states, part, name, kept_name(slot, name))
        if self._work.keeps_optimizer and self._work.optimizer is not None:
            for key, own in zip(self._work.optimizer.state_names, self._module.state, strict=True):
                for name in self._module.layout.names:
                    self._deal(states, own.of(name), name, f"optimizer/{key}/{name}")
            if self._work.optimizer.counts_steps:
                for place, made in enumerate(num_steps):
                    total = self._steps[place, 0].float() + made
                    states[place].update(
                        {f"optimizer/step/{name}": total.clone() for name in self._module.layout.names}
                    )
        for name in self._work.own:
            if name in self._module.layout.spans:
                self._deal(states, self._module.parameters.of(name), name, f"own/{name}")
                continue
            for place, state in enumerate(states):
                statistics = self._module.buffers.get(name)
                value = start.still[name] if statistics is None else statistics[place]
                state[f"own/{name}"] = value.clone()
        return states

    def _begin_client(self, place: int, state: Mapping[str, torch.Tensor]) -> None:
        held = {f"kept/{slot}": own for slot, own in self.kept.items()}
        if self._work.keeps_optimizer and self._work.optimizer is not None:
            names = self._work.optimizer.state_names
            held.update({f"optimizer/{key}": own for key, own in zip(names, self._module.state, strict=True)})
        held["own"] = self._module.parameters
        for full, tensor in state.items():
            kind, _, name = full.partition("/")
            if kind != "own":
                what, _, name = name.partition("/")
                kind = f"{kind}/{what}"
            if kind in held and name in self._module.layout.spans:
                held[kind].of(name)[place] = tensor.flatten()
            elif kind == "own" and name in self._module.buffers:
                self._module.buffers[name][place] = tensor
            if kind == "optimizer/step":
                self._steps[place] = float(tensor)
            elif kind.startswith("optimizer/"):
                self._steps[place].clamp_(min=1)  # no fresh one, whether it counts its steps or not

    @torch.no_grad()
    def _after(self, name: str, rate_sums: torch.Tensor, start: RoundStart) -> dict[str, torch.Tensor]:
        """[K, n] the rule's tensors of one parameter after the round, by slot."""
        assert self._work.rule is not None
        begin, end, _ = self._module.layout.spans[name]
        clients, parameters = len(rate_sums), self._module.parameters.of(name)
        return self._work.rule.keep(
            parameters[:clients] - start.parameters[begin:end],
            received={slot: row[begin:end] for slot, row in start.received.items()},
            kept={slot: own.of(name)[:clients] for slot, own in self.kept.items()},
            rate_sum=rate_sums.unsqueeze(1).to(parameters.dtype),
        )

    def _deal(
        self, states: Sequence[dict[str, torch.Tensor]], part: torch.Tensor, name: str, full: str
    ) -> None:
        """Give each client its own of a parameter's, [K, n]."""
        shape = self._module.layout.spans[name].shape
        for place, state in enumerate(states):
            state[full] = part[place].view(shape).clone()
