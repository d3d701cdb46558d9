"""A computation recorded once, and replayed: the same operations on the same memory, without the Python around them.

A chunk's step is some thirty operations of a few dozen microseconds. Between them the model's forward, autograd and
the batched rules take as long again, and hold Python's lock meanwhile, for which the other threads wait. A `Tape`
keeps just the operations: views are made once, results go to memory planned beforehand, where those that do not live at
the same time share their places, and torch's own interpreter runs one operation after another, without Python and its
lock.

What is recorded must not depend on anything but the tensors that it reads; `is_same` tells two recordings apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from fedmp.cohort.recording import Call, Place, Recording, storage_of
from fedmp.cohort.tape_fusion import fused
from fedmp.cohort.tape_memory import arrange, lifetimes, share
from fedmp.cohort.tape_program import CannotReplayError, Program, plan_of

__all__ = ["CannotReplayError", "Tape"]


class Tape:
    """A recording, ready to be replayed any number of times.

    Args:
        recording: of one computation.
        known: tensors that exist before and after it, which it may read and change.
        results: tensors that it makes, to be read after each replay.

    Attributes:
        results: these, as plain tensors; each replay overwrites them.
        written: the known tensors that it changes, whole.
        num_bytes: of memory that it holds.

    Raises:
        CannotReplayError: it holds operations that cannot be replayed.
    """

    def __init__(
        self, recording: Recording, *, known: Iterable[torch.Tensor], results: Sequence[torch.Tensor]
    ) -> None:
        if recording.refusal:
            raise CannotReplayError(recording.refusal)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            for tensor in results:
                if storage_of(tensor) not in recording.num_bytes:  # no operation has seen it
                    recording.held[storage_of(tensor)] = tensor.untyped_storage()
            places = [recording.place(tensor) for tensor in results]
            try:
                self._build(recording, {storage_of(tensor) for tensor in known}, places)
            except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # a private API is not there
                raise CannotReplayError(f"it cannot be written down: {error!r:.200}") from error

    def is_same(self, other: Tape) -> bool:
        """Whether both do the same, reading and changing the same tensors of those that were there before."""
        return self._signature == other._signature

    def replay(self) -> None:
        """Do it again, on what the known tensors hold now.

        Raises:
            RuntimeError: an operation fails on these values.
        """
        with torch.no_grad(), self._execution(False):  # there is nothing to fuse: looking for it takes 30 ms
            self._function(*self._tensors)

    @property
    def is_intact(self) -> bool:
        """Whether no operation has given a tensor another shape than it was recorded with."""
        return [(t.shape, t.stride(), t.data_ptr()) for t in self._tensors] == self._shapes

    def _build(self, recording: Recording, known: set[int], results: Sequence[Place]) -> None:
        wanted = {place.storage for place in results}
        made = _origins(recording.calls, known)
        constant = _constants(recording.calls, made)
        kept = _needed(recording.calls, known | wanted, constant)
        self._signature = _signature(kept, made, constant)
        kept = fused(kept)
        memories = lifetimes(kept, constant, wanted, recording.num_bytes)
        plans = [plan_of(call) for call in kept]
        for index, (call, plan) in enumerate(zip(kept, plans, strict=True)):
            if not plan.is_fresh:
                share(index, call, memories)
                continue
            for storage in call.left:
                memories.pop(storage, None)
        self.num_bytes = arrange(memories.values())
        arena = torch.empty(self.num_bytes, dtype=torch.uint8).untyped_storage()
        program = Program(arena, memories, recording.held)
        for call, plan in zip(kept, plans, strict=True):
            if plan.func is not None:
                program.add(plan, call.result)
        self.results = [program.result(place) for place in results]
        self._function, self._tensors = program.finish()
        self._execution = torch.jit.optimized_execution  # type: ignore[attr-defined]
        self._shapes = [(t.shape, t.stride(), t.data_ptr()) for t in self._tensors]
        written = set[int]().union(*(call.changed for call in kept)) & known
        dtypes = {place.storage: place.dtype for call in kept for place in call.inputs}
        self.written = [_whole(recording.held[storage], dtypes[storage]) for storage in sorted(written)]


def _origins(calls: Sequence[Call], known: set[int]) -> set[int]:
    """Storages that come into being on the way.

    Raises:
        CannotReplayError: one that was there before, or came from elsewhere, is changed without being known.
    """
    made: set[int] = set()
    for call in calls:
        if call.changed - made - known:
            raise CannotReplayError(f"{call.name} changes a tensor that is not known")
        made |= call.left - call.read - known
    return made


def _constants(calls: Sequence[Call], made: set[int]) -> dict[int, Call]:
    """Storages made of no tensor's values and never changed, and what made them: they are the same in each replay."""
    found: dict[int, Call] = {}
    for call in calls:
        if call.is_fixed:
            found.update(dict.fromkeys(call.left & made, call))
        for storage in call.changed & found.keys():
            del found[storage]
    return found


def _needed(calls: Sequence[Call], wanted: set[int], constant: Mapping[int, Call]) -> list[Call]:
    """The calls whose results anything depends on; views are none of them."""
    needed, kept = set(wanted), []
    for call in reversed(calls):
        if call.outputs or call.changed:  # others are checks
            is_view = not call.changed and call.left <= call.read
            is_constant = bool(call.left) and call.left <= constant.keys()
            if is_view or is_constant or not (call.changed | call.left - call.read) & needed:
                continue
        kept.append(call)
        needed |= call.read
    return kept[::-1]


def _signature(calls: Sequence[Call], made: set[int], constant: Mapping[int, Call]) -> list[Any]:
    """What the calls do, to be compared with another recording's."""
    labels: dict[int, Any] = {}

    def label(value: Any) -> Any:
        if not isinstance(value, Place):
            return value
        if value.storage in constant:
            maker = constant[value.storage]
            given = tree_flatten((maker.args, maker.kwargs))[0]
            return maker.func, [leaf for leaf in given if not isinstance(leaf, Place)], value.view
        if value.storage in made:
            labels.setdefault(value.storage, f"#{len(labels)}")
        return labels.get(value.storage, value.storage), *value.view

    found = []
    for call in calls:
        leaves, shape = tree_flatten((call.args, call.kwargs, call.result))
        found.append((call.func, shape, [label(leaf) for leaf in leaves]))
    return found


def _whole(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.Tensor:
    """All of a storage as a tensor."""
    return torch.empty(0, dtype=dtype).set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))
