"""Computations on a chunk's tensors: in Python at first, then from a tape.

A kind of computation (which clients, which shapes) is recorded twice. Only if both recordings do the same, nothing but
tensors changed meanwhile, and a replay gives what the computation itself gave, the tape replaces it from then on.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from fedmp.cohort.module import StackedModule
from fedmp.cohort.probe import is_close
from fedmp.cohort.recording import Recording, record, storage_of
from fedmp.cohort.registry import CannotStackError
from fedmp.cohort.tape import CannotReplayError, Tape
from fedmp.pipeline import give_back

__all__ = ["Compute", "Replays"]

_TOLERANCE = 1e-5  # of the largest entry; a replay does the same arithmetic, at other addresses
_KINDS = 1024  # that are counted
_TAPES_BYTES = 16 << 20  # that tapes may hold, unless the one in use takes more
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ONE_AT_A_TIME = threading.Lock()  # what is recorded and tried out takes memory meanwhile
_TENSORS_OF = ("_parameters", "_buffers")  # a module; one that is replaced shows on the tape
_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_WRITTEN = {*_PLAIN, tuple, list, dict, set, frozenset}

Tensors: TypeAlias = Sequence[torch.Tensor]
Compute: TypeAlias = Callable[[Tensors], tuple[Tensors, Any]]


@dataclass(eq=False)
class _Kind:
    """What is known of computations that are alike."""

    spent_s: float = 0.0
    times: int = 0
    given: list[torch.Tensor] = field(default_factory=list)
    candidate: Tape | None = None
    tape: Tape | None = None
    note: Any = None

    @property
    def num_bytes(self) -> int:
        """That it holds."""
        tapes = [tape for tape in (self.tape, self.candidate) if tape is not None]
        return sum(tape.num_bytes for tape in tapes) + sum(tensor.nbytes for tensor in self.given)


class Replays:
    """Runs computations that read and change a chunk's tensors, and what they are given.

    Args:
        module: whose tensors these are.
        roots: objects whose Python the computations run, besides the module's.
        scratch: tensors of the module's in which nobody looks for anything after a computation.

    Attributes:
        refusal: why nothing is replayed; empty while it may be.
        num_replayed: computations that were.
        is_recording: whether one is being recorded, which then must show all of its operations.
    """

    def __init__(self, module: StackedModule, roots: Sequence[object], scratch: Tensors = ()) -> None:
        self._module, self._roots = module, (module.module, *roots)
        self._scratch = set(map(storage_of, scratch))
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self.num_replayed = self._num_bytes = 0
        self._latest: _Kind | None = None  # that was replayed
        self.refusal = ""
        self.is_recording = False

    def run(
        self, key: Hashable, given: Tensors, compute: Compute, *, worth_s: float, times: int = 1
    ) -> tuple[Tensors, Any]:
        """Run a computation.

        Args:
            key: of its kind: all that decides what is done, besides tensors' values.
            given: tensors that it reads.
            compute: does it; returns its results, and a note for which there is no tensor. It may be run again
                after it has begun.
            worth_s, times: seconds that computations of a kind take together, and how many there are, before one is
                recorded.

        Returns:
            The results, which the next computation may overwrite; and the note, that of the last recording where
            the computation is replayed.

        Raises:
            CannotStackError: the model cannot be run for many clients at once.
        """
        if self.refusal:
            return compute(given)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind()
        self._kinds.move_to_end(key)
        if kind.tape is not None:
            self._latest = kind
            self.num_replayed += 1
            return self._replay(kind, kind.tape, given, compute)
        if kind.spent_s < worth_s or kind.times < times:
            kind.times += 1
            self._forget()
            begun_s = time.perf_counter()
            found = compute(given)
            kind.spent_s += time.perf_counter() - begun_s
            return found
        try:
            with _ONE_AT_A_TIME:
                return self._record(kind, given, compute)
        except CannotReplayError as error:
            self.refusal = str(error)
            return compute(given)
        finally:
            if self.refusal:
                self._kinds.clear()
            self._num_bytes = sum(kind.num_bytes for kind in self._kinds.values())

    def clear(self) -> None:
        """Forget all tapes."""
        self._kinds.clear()
        self._latest, self._num_bytes = None, 0

    @property
    def num_kinds_held(self) -> int:
        """Kinds that hold memory."""
        return sum(kind.num_bytes > 0 for kind in self._kinds.values())

    def _replay(self, kind: _Kind, tape: Tape, given: Tensors, compute: Compute) -> tuple[Tensors, Any]:
        for held, tensor in zip(kind.given, given, strict=True):
            held.copy_(tensor)
        try:
            tape.replay()
        except RuntimeError:  # on these values; Python says so in torch's own words
            compute(given)
            raise
        return tape.results, kind.note

    def _record(self, kind: _Kind, given: Tensors, compute: Compute) -> tuple[Tensors, Any]:
        """Run it, and record it.

        Raises:
            CannotReplayError: it cannot be recorded, and has not been run to its end.
        """
        around, has_hooks = _python_state(*self._roots)
        if has_hooks:
            raise CannotReplayError("a module has hooks")
        if not kind.given:
            kind.given = [tensor.clone() for tensor in given]
        for held, tensor in zip(kind.given, given, strict=True):
            held.copy_(tensor)
        known = [*kind.given, *self._module.tensors()]
        earlier = kind.candidate
        before = [tensor.clone() for tensor in self._left(earlier)] if earlier is not None else []
        moved = [self._module.parameters.flat, *self._module.buffers.values()]
        unmoved = [tensor.clone() for tensor in moved]
        self.is_recording = True
        try:
            (results, note), recording = record(lambda: compute(kind.given))
        except CannotStackError as error:  # only while it is recorded: vmap then takes some functions apart
            for tensor, held in zip(moved, unmoved, strict=True):
                tensor.copy_(held)
            raise CannotReplayError(str(error)) from error
        finally:
            self.is_recording = False
        kind.note = note
        if bool(torch.isfinite(results[0]).all()):  # the training is about to end, otherwise
            self.refusal = self._judge(kind, recording, known, results, before, around)
        return results, note

    def _judge(
        self,
        kind: _Kind,
        recording: Recording,
        known: list[torch.Tensor],
        results: Tensors,
        before: Tensors,
        around: bytes,
    ) -> str:
        """Why what was recorded cannot be replayed; empty if it can, or is to be recorded once more."""
        try:
            if _python_state(*self._roots)[0] != around:
                return "its forward changes something besides tensors"
            tape = Tape(recording, known=known, results=results)
        except CannotReplayError as error:
            return str(error)
        earlier, kind.candidate = kind.candidate, tape
        if earlier is None:
            return ""
        kind.candidate = None
        if not tape.is_same(earlier):
            return "its forward does not do the same each time"
        if not _replays(tape, self._left(tape), before, results):
            return "a replay fails or gives something else"
        kind.tape = tape
        give_back()  # the tape has memory of its own
        return ""

    def _left(self, tape: Tape) -> list[torch.Tensor]:
        """What a tape changes and leaves for others."""
        return [tensor for tensor in tape.written if storage_of(tensor) not in self._scratch]

    def _forget(self) -> None:
        """Drop the kinds that came least lately, where there are many or they hold too much."""
        if len(self._kinds) <= _KINDS and self._num_bytes <= _TAPES_BYTES:
            return
        for key, kind in list(self._kinds.items()):
            if len(self._kinds) <= _KINDS and self._num_bytes <= _TAPES_BYTES:
                break
            if kind is not self._latest and kind is not next(reversed(self._kinds.values())):
                self._num_bytes -= kind.num_bytes
                del self._kinds[key]


def _replays(tape: Tape, written: Tensors, before: Tensors, results: Tensors) -> bool:
    """Whether a replay of what was just run gives the same; what was written stays."""
    after = [tensor.clone() for tensor in written]
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(old)
    try:
        tape.replay()
        if not tape.is_intact:
            return False
        pairs = [*zip(written, after, strict=True), *zip(tape.results, results, strict=True)]
        return all(is_close(found, expected, _TOLERANCE) for found, expected in pairs)
    except RuntimeError:  # torch's interpreter does not know an operation
        return False
    finally:
        for tensor, new in zip(written, after, strict=True):
            tensor.copy_(new)


class _Snapshot(pickle.Pickler):
    """Writes down what Python code could go by, besides tensors: all that hangs on some objects, and the generators.

    Tensors, functions and classes count as what they are, modules as what they hold. Of what is written only the
    digest is kept.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        super().__init__(self)
        self.modules: dict[int, nn.Module] = {}

    def write(self, data: bytes) -> None:
        """Take what is written down."""
        self._digest.update(data)

    def digest(self) -> bytes:
        """Of all that was written."""
        return self._digest.digest()

    def persistent_id(self, value: Any) -> Any:
        """What stands for an object that is not written down itself."""
        if type(value) in _WRITTEN:  # most are: to ask the rest takes longer than to write them down
            return None
        if isinstance(value, nn.Module):
            self.modules.setdefault(id(value), value)
            return "module", id(value)
        is_itself = isinstance(value, torch.Tensor | type) or inspect.isroutine(value)
        return ("object", id(value)) if is_itself else None


def _python_state(*roots: Any) -> tuple[bytes, bool]:
    """What a forward could change or go by, besides tensors; and whether any module has hooks.

    Raises:
        CannotReplayError: an object cannot be compared.
    """
    snapshot, done = _Snapshot(), 0
    try:
        snapshot.dump((roots, random.getstate(), np.random.get_state(legacy=False)))
        while done < len(snapshot.modules):  # more are found on the way
            module = list(snapshot.modules.values())[done]
            held = {name: value for name, value in vars(module).items() if name not in _TENSORS_OF}
            kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")]
            shared = [value for kind in kinds for value in vars(kind).values() if isinstance(value, _PLAIN)]
            snapshot.dump((held, shared))
            done += 1
    except Exception as error:  # whatever an object's own pickling raises
        raise CannotReplayError(f"a module holds what cannot be compared: {error!r:.100}") from error
    has_hooks = any(getattr(one, name, None) for one in snapshot.modules.values() for name in _HOOKS)
    return snapshot.digest(), has_hooks
