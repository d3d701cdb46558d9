"""What the clients of a chunk carry from round to round: a rule's slots, an optimizer's moments, values of their own.

It comes from a `Memory` when a chunk begins and goes back when the chunk is done, under the names and with the values
of a client that trains alone (`fedmp.client.state`), so that either way of training can go on where the other left off.

Shape letters: K clients of a chunk, P trained parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from fedmp.cohort.module import StackedModule
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
        kept: [K, P] the rule's tensors, by slot.
    """

    def __init__(self, module: StackedModule, work: ChunkWork) -> None:
        self._module, self._work = module, work
        slots = work.rule.kept if work.rule else ()
        self.kept = {slot: torch.zeros_like(module.parameters) for slot in slots}
        self._steps = torch.zeros(len(module.parameters), 1, dtype=torch.float64)
        self._names = [name for name in module.layout.names if name not in work.own]

    def begin(self, states: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Take the clients' states over; the module holds the global model already."""
        for rows in self.kept.values():
            rows[: len(states)].zero_()
        self._steps.zero_()
        if self._work.keeps_optimizer:
            for rows in self._module.state:
                rows[: len(states)].zero_()
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
        for slot, rows in self._after(rate_sums, start).items():
            for name in self._names:
                self._deal(states, rows, name, kept_name(slot, name))
        if self._work.keeps_optimizer and self._work.optimizer is not None:
            for key, rows in zip(self._work.optimizer.state_names, self._module.state, strict=True):
                for name in self._module.layout.names:
                    self._deal(states, rows, name, f"optimizer/{key}/{name}")
            if self._work.optimizer.counts_steps:
                for place, made in enumerate(num_steps):
                    total = self._steps[place, 0].float() + made
                    states[place].update(
                        {f"optimizer/step/{name}": total.clone() for name in self._module.layout.names}
                    )
        for name in self._work.own:
            if name in self._module.layout.spans:
                self._deal(states, self._module.parameters, name, f"own/{name}")
                continue
            for place, state in enumerate(states):
                statistics = self._module.buffers.get(name)
                value = start.still[name] if statistics is None else statistics[place]
                state[f"own/{name}"] = value.clone()
        return states

    def _begin_client(self, place: int, state: Mapping[str, torch.Tensor]) -> None:
        rows_of = {f"kept/{slot}": rows for slot, rows in self.kept.items()}
        if self._work.keeps_optimizer and self._work.optimizer is not None:
            names = self._work.optimizer.state_names
            rows_of.update(
                {f"optimizer/{key}": rows for key, rows in zip(names, self._module.state, strict=True)}
            )
        rows_of["own"] = self._module.parameters
        spans = self._module.layout.spans
        for full, tensor in state.items():
            kind, _, name = full.partition("/")
            if kind != "own":
                what, _, name = name.partition("/")
                kind = f"{kind}/{what}"
            if kind in rows_of and name in spans:
                begin, end, _ = spans[name]
                rows_of[kind][place, begin:end] = tensor.flatten()
            elif kind == "own" and name in self._module.buffers:
                self._module.buffers[name][place] = tensor
            if kind == "optimizer/step":
                self._steps[place] = float(tensor)
            elif kind.startswith("optimizer/"):
                self._steps[place].clamp_(min=1)  # no fresh one, whether it counts its steps or not

    @torch.no_grad()
    def _after(self, rate_sums: torch.Tensor, start: RoundStart) -> dict[str, torch.Tensor]:
        """[K, P] the rule's tensors after the round, by slot."""
        if self._work.rule is None or not self.kept:
            return {}
        clients, parameters = len(rate_sums), self._module.parameters
        return self._work.rule.keep(
            parameters[:clients] - start.parameters,
            received=start.received,
            kept={slot: rows[:clients] for slot, rows in self.kept.items()},
            rate_sum=rate_sums.unsqueeze(1).to(parameters.dtype),
        )

    def _deal(
        self, states: Sequence[dict[str, torch.Tensor]], rows: torch.Tensor, name: str, full: str
    ) -> None:
        """Give each client its own of a parameter's stacked tensors."""
        begin, end, shape = self._module.layout.spans[name]
        for place, state in enumerate(states):
            state[full] = rows[place, begin:end].view(shape).clone()
