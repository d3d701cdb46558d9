"""Faults on purpose: what a job's `faults` do in the process of the device that they name.

A device without faults of its own has nothing of this on its way.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedmp.pipeline import Pending, Transport
from fedmp.records import Fault, TimedAction

__all__ = ["Saboteur"]

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass
class Saboteur:
    """Lets faults happen, each once.

    Args:
        faults: of this device.

    Attributes:
        round, attempt, step: where the device is; kept by the device.
    """

    faults: Sequence[Fault]
    round: int = 0
    attempt: int = 1
    step: int = 0
    _done: set[int] = field(default_factory=set)

    def begin(self, round: int, attempt: int) -> None:
        """The device begins a round, perhaps not for the first time."""
        self.round, self.attempt, self.step = round, attempt, 0

    def at(self, phase: str, *, stage: int | None = None, microbatch: int | None = None) -> Fault | None:
        """Let what is due here happen; a fault that concerns a message is returned for whoever has it."""
        for number, fault in enumerate(self.faults):
            if number in self._done or not self._is_due(fault, phase, stage, microbatch):
                continue
            self._done.add(number)
            if fault.kind in _SIGNALS:
                os.kill(os.getpid(), _SIGNALS[fault.kind])
            elif fault.kind == "delay":
                time.sleep(fault.delay_s)
            else:
                return fault
        return None

    def observer(self) -> Callable[[TimedAction], None] | None:
        """For the runner, in a round in which something happens at a computation."""
        phases = {fault.phase for fault in self.faults if fault.round == self.round}
        if not phases & {"forward", "backward"}:
            return None

        def observe(action: TimedAction) -> None:
            if action.kind in ("forward", "backward"):
                self.at(action.kind, stage=action.stage, microbatch=action.microbatch)

        return observe

    def wrap(self, transport: Transport) -> Transport:
        """The transport, whose messages get lost or damaged if that is wanted."""
        return _FaultyTransport(transport, self) if any(f.phase == "send" for f in self.faults) else transport

    def spoil(self, update: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An update as bits that flipped on the way might leave it."""
        spoiled = {name: tensor.clone() for name, tensor in update.items()}
        for tensor in spoiled.values():
            if tensor.is_floating_point():
                tensor.view(-1)[0] = float("nan")
        return spoiled

    def _is_due(self, fault: Fault, phase: str, stage: int | None, microbatch: int | None) -> bool:
        return (
            (fault.phase, fault.round, fault.attempt) == (phase, self.round, self.attempt)
            and fault.step in (None, self.step)
            and fault.stage in (None, stage)
            and fault.microbatch in (None, microbatch)
        )


class _FaultyTransport:
    """A transport that loses or damages a message."""

    def __init__(self, transport: Transport, saboteur: Saboteur) -> None:
        self._transport = transport
        self._saboteur = saboteur
        self.generation = transport.generation
        self.device = transport.device
        self.is_ordered = transport.is_ordered

    def send(self, buffer: torch.Tensor, peer: int, tag: int) -> Pending:
        fault = self._saboteur.at("send", stage=tag >> 20 & 0xFF, microbatch=tag >> 10 & 0x3FF)
        if fault is None:
            return self._transport.send(buffer, peer, tag)
        if fault.kind == "drop":
            return _Lost()
        damaged = buffer.clone()
        damaged[8] ^= 0xFF  # in the frame's header
        return self._transport.send(damaged, peer, tag)

    def receive(self, buffer: torch.Tensor, peer: int, tag: int) -> Pending:
        return self._transport.receive(buffer, peer, tag)


class _Lost:
    """A message that will never arrive, although it seems to have been sent."""

    def wait(self) -> None:
        return
