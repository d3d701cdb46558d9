"""Passes of a chunk through the model and back: by the model's own Python at first, then from a tape.

A kind of pass (which clients, which shapes) is recorded twice. Only if both recordings do the same, nothing but
tensors changed meanwhile, and a replay gives what the model's own pass gave, the tape replaces it from then on.

Shape letters: K clients, B samples of a batch.
"""

from __future__ import annotations

import math
import random
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmp.cohort.module import StackedModule
from fedmp.cohort.objective import Objective
from fedmp.cohort.recording import record
from fedmp.cohort.tape import CannotReplayError, Tape
from fedmp.pipeline import give_back

__all__ = ["Pass", "Passes"]

_RECORDED_FROM = 2  # passes of a kind that are not worth it
_TOLERANCE = 1e-5  # of the largest entry; a replay does the same arithmetic, at other addresses
_PAYS_AFTER = 16  # replays, when one more recording is worth it; so many are made anyway:
_RECORDED_FREELY = 32
_KINDS = 1024  # that are counted
_TAPES_BYTES = 16 << 20  # that a chunk's tapes may hold, beside the one in use
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ONE_AT_A_TIME = threading.Lock()  # what is recorded and tried out takes memory meanwhile
_TENSORS_OF = ("_parameters", "_buffers")  # a module; one that is replaced shows on the tape
_PLAIN = (int, float, complex, bool, str, bytes, type(None))


@dataclass(frozen=True, eq=False)
class Pass:
    """Samples of neighbouring clients that go through the model together.

    Attributes:
        first, stop: the clients.
        inputs, targets: [K, B, ...].
        weights: [K] of the targets.
    """

    first: int
    stop: int
    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


@dataclass(eq=False)
class _Kind:
    """What is known of passes that are alike."""

    seen: int = 0
    given: list[torch.Tensor] = field(default_factory=list)
    candidate: Tape | None = None
    tape: Tape | None = None
    written: tuple[bool, ...] = ()


class Passes:
    """Runs passes, each of which adds its clients' gradients to the module's.

    Args:
        module: the clients' weights.
        objective: the loss.
        replays: whether tapes may be used.

    Attributes:
        refusal: why they are not; empty while they may be.
        num_replayed: passes that were replayed.
    """

    def __init__(self, module: StackedModule, objective: Objective, *, replays: bool) -> None:
        self._module, self._objective = module, objective
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._num_recorded = self.num_replayed = 0
        self.refusal = "" if replays else "not wanted"
        if any(getattr(one, name, None) for one in module.module.modules() for name in _HOOKS):
            self.refusal = "a module has hooks"

    def run(self, one: Pass, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a pass.

        Args:
            one: the pass.
            totals: [K] weights of the whole batches that it is a part of.

        Returns:
            [K] summed losses and [K] correct predictions; the next pass may overwrite them.

        Raises:
            CannotStackError: the model cannot be run for many clients at once.
        """
        given = [one.inputs, one.targets, totals]
        if self.refusal:
            return self._plainly(one.first, one.stop, *given)
        before = self._module.written(one.first, one.stop)
        key = (one.first, one.stop, before, *((tensor.shape, tensor.dtype) for tensor in given))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind()
        self._kinds.move_to_end(key)
        if kind.tape is not None:
            self.num_replayed += 1
            for held, tensor in zip(kind.given, given, strict=True):
                held.copy_(tensor)
            kind.tape.replay()
            self._module.mark_written(one.first, one.stop, kind.written)
            sums, correct = kind.tape.results
            return sums, correct
        kind.seen += 1
        may_record = self._num_recorded <= _RECORDED_FREELY + self.num_replayed // _PAYS_AFTER
        if kind.seen <= _RECORDED_FROM or not may_record:
            self._forget()
            return self._plainly(one.first, one.stop, *given)
        self._num_recorded += 1
        with _ONE_AT_A_TIME:
            results = self._record(kind, one, given)
        if self.refusal:
            self._kinds.clear()
        return results

    def _plainly(
        self, first: int, stop: int, inputs: torch.Tensor, targets: torch.Tensor, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model's own forward and backward."""
        output = self._module.run(inputs, first, stop)
        sums = self._objective.loss_sums(output, targets)
        if sums.requires_grad:
            self._objective.go_back(sums, totals)
            self._module.collect(first, stop)
        return sums.detach(), self._objective.num_correct(output, targets)

    def _record(self, kind: _Kind, one: Pass, given: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run it so, too, and record it."""
        if not kind.given:
            kind.given = [tensor.clone() for tensor in given]
        for held, tensor in zip(kind.given, given, strict=True):
            held.copy_(tensor)
        known = [*kind.given, *self._module.tensors()]
        earlier, around = kind.candidate, _python_state(self._module.module)
        before = [tensor.clone() for tensor in earlier.written()] if earlier is not None else []
        (sums, correct), recording = record(lambda: self._plainly(one.first, one.stop, *kind.given))
        kind.written = self._module.written(one.first, one.stop)
        if not bool(torch.isfinite(sums).all()):
            return sums, correct  # the training is about to end
        if _python_state(self._module.module) != around:
            self.refusal = "its forward changes something besides tensors"
            return sums, correct
        try:
            tape = Tape(recording, known=known, results=[sums, correct])
        except CannotReplayError as error:
            self.refusal = str(error)
            return sums, correct
        if earlier is None:
            kind.candidate = tape
        elif not tape.is_same(earlier):
            self.refusal = "its forward does not do the same each time"
        elif _replays(tape, before, [sums, correct]):
            kind.tape, kind.candidate = tape, None
            give_back()  # the tape has memory of its own
        else:
            self.refusal = "a replay gives something else"
        return sums, correct

    def _forget(self) -> None:
        """Drop the kinds that were used least lately, where they hold too much."""
        held = sum(kind.tape.num_bytes for kind in self._kinds.values() if kind.tape is not None)
        while len(self._kinds) > _KINDS or (held > _TAPES_BYTES and len(self._kinds) > 1):
            _, kind = self._kinds.popitem(last=False)
            held -= kind.tape.num_bytes if kind.tape is not None else 0


def _replays(tape: Tape, before: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    """Whether a replay of a pass that was just run gives the same; what the pass wrote stays."""
    written = tape.written()
    after = [tensor.clone() for tensor in written]
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(old)
    try:
        tape.replay()
        pairs = [*zip(written, after, strict=True), *zip(tape.results, results, strict=True)]
        return all(_is_close(found, expected) for found, expected in pairs)
    except RuntimeError:  # torch's interpreter does not know an operation
        return False
    finally:
        for tensor, new in zip(written, after, strict=True):
            tensor.copy_(new)


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if torch.equal(found, expected):
        return True
    found, expected = found.double(), expected.double()
    largest = float(expected.abs().max())
    return math.isfinite(largest) and torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * largest)


def _python_state(model: nn.Module) -> Any:
    """What a forward could change or depend on, besides tensors: attributes of modules, generators."""
    drawn = np.random.get_state(legacy=False)
    attributes = [
        {name: _comparable(value) for name, value in vars(one).items() if name not in _TENSORS_OF}
        for one in model.modules()
    ]
    return random.getstate(), drawn["state"]["key"].tobytes(), drawn["state"]["pos"], attributes


def _comparable(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return [(key, _identity(own)) for key, own in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [_identity(own) for own in value]
    return id(value)


def _identity(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else id(value)
