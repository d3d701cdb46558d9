"""A computation recorded once, and replayed: the same operations on the same memory, without the Python around them.

A chunk's step is some thirty operations of a few dozen microseconds. Between them the model's forward, autograd and
the batched rules take as long again, and hold Python's lock meanwhile, for which the other threads wait. A `Tape`
keeps just the operations: views are made once, results go to memory planned beforehand, where those that do not live at
the same time share their places, and torch's own interpreter runs one operation after another, without Python and its
lock.

What is recorded must not depend on anything but the tensors that it reads; `is_same` tells two recordings apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten

from fedmp.cohort.recording import Call, Place, Recording, storage_of

__all__ = ["CannotReplayError", "Tape"]

_ALIGNMENT = 64  # bytes, as torch aligns its own memory
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# whose variants that write into given tensors make other shapes of them, or are not told from other overloads
_UNFIT = {
    *("binary_cross_entropy", "huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss", "soft_margin_loss"),
    *("linalg_qr", "max", "min"),
}
aten = torch.ops.aten


class CannotReplayError(Exception):
    """What was recorded cannot be replayed."""


@dataclass(eq=False)
class _Memory:
    """A storage that comes into being on the tape.

    Attributes:
        num_bytes: of it.
        first, last: calls that make it and use it last.
        shares: the memory it lies in, where an operation overwrites what it read.
        offset: in bytes, in the arena; None where it shares.
    """

    num_bytes: int
    first: int
    last: int
    shares: _Memory | None = None
    offset: int | None = None


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
        memories = _lifetimes(kept, constant, wanted, recording.num_bytes)
        plans = [_plan(call) for call in kept]
        for index, (call, plan) in enumerate(zip(kept, plans, strict=True)):
            _share(index, call, plan, memories)
            if plan.is_fresh:
                for storage in call.left:
                    memories.pop(storage, None)
        self.num_bytes = _arrange(memories.values())
        arena = torch.empty(self.num_bytes, dtype=torch.uint8).untyped_storage()
        program = _Program(arena, memories, recording.held)
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


class _Plan(NamedTuple):
    """How a call is replayed: `func` None for not at all; `is_fresh` where its results are new tensors each time."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_fresh: bool = False

    @property
    def takes_number(self) -> bool:
        """Whether a number stands for a tensor: the interpreter then takes the overload for numbers."""
        arguments = zip(self.func._schema.arguments, self.args, strict=False)
        return any(str(a.type) == "Tensor" and isinstance(value, int | float) for a, value in arguments)


class _Program:
    """Calls as a function of torch's own interpreter, which runs all of them while the lock is free for others.

    Args:
        arena: memory of what is made on the way.
        memories: where in it each storage lies.
        held: storages that are there before. All others are new in each replay.
    """

    def __init__(
        self,
        arena: torch.UntypedStorage,
        memories: Mapping[int, _Memory],
        held: Mapping[int, torch.UntypedStorage],
    ) -> None:
        self._arena, self._memories, self._held = arena, memories, held
        self._graph: Any = torch._C.Graph()
        self._given: list[torch.Tensor] = []
        self._inputs: dict[Place, tuple[torch.Tensor, Any]] = {}
        self._fresh: dict[int, tuple[Place, Any]] = {}

    def add(self, plan: _Plan, result: Any) -> None:
        """Add a call, and what it gave when it was recorded.

        Raises:
            CannotReplayError: the interpreter would run something else.
        """
        schema = plan.func._schema
        given = {a.name: value for a, value in zip(schema.arguments, plan.args, strict=False)}
        given.update(plan.kwargs)
        values = [self._value(given.get(a.name, a.default_value), a.type) for a in schema.arguments]
        node = self._insert(schema.name, values, len(schema.returns))
        if _overload(str(node.schema())) != _overload(str(schema)) and not plan.takes_number:
            raise CannotReplayError(f"{schema.name} would be another of its overloads")
        if plan.is_fresh:
            found = result if isinstance(result, tuple) else [result]
            for index, place in enumerate(found):
                if isinstance(place, Place):
                    self._fresh[place.storage] = place, node.outputsAt(index)

    def result(self, place: Place) -> torch.Tensor:
        """Where to read a result after each replay."""
        if place.storage not in self._fresh:
            return self._input(place)[0]
        kept = torch.empty(place.size, dtype=place.dtype)
        value = self._taken(kept)
        self._insert("aten::copy_", [value, self._value(place), self._constant(False)])
        return kept

    def finish(self) -> tuple[Callable[..., Any], list[torch.Tensor]]:
        """The function, and what it is to be called with."""
        self._graph.registerOutput(self._constant(None))
        function = torch._C._create_function_from_graph("tape", self._graph)
        return function, self._given

    def _value(self, value: Any, kind: Any = None) -> Any:
        """A value in the graph."""
        if isinstance(value, Place):
            if value.storage not in self._fresh:
                return self._input(value)[1]
            base, made = self._fresh[value.storage]
            if value == base:
                return made
            if value.dtype != base.dtype:
                raise CannotReplayError("a new tensor is read as another type")
            where = map(self._constant, (list(value.size), list(value.stride), value.offset))
            return self._insert("aten::as_strided", [made, *where]).outputsAt(0)
        if str(kind).startswith("Optional") and value is not None:
            kind = kind.getElementType()
        if isinstance(value, list | tuple) and (not value or not isinstance(value[0], int | float)):
            node = self._insert("prim::ListConstruct", [self._value(item) for item in value])
            node.outputsAt(0).setType(kind)
            return node.outputsAt(0)
        if isinstance(value, int) and not isinstance(value, bool) and str(kind) == "float":
            value = float(value)
        return self._constant(list(value) if isinstance(value, tuple) else value)

    def _input(self, place: Place) -> tuple[torch.Tensor, Any]:
        """A tensor that is there from one replay to the next, as a plain one, and as a value in the graph."""
        if place not in self._inputs:
            tensor, memory = torch.empty(0, dtype=place.dtype), self._memories.get(place.storage)
            if memory is None:
                tensor.set_(self._held[place.storage], place.offset, place.size, place.stride)
            else:
                first = _root(memory).offset
                assert first is not None
                offset = first // place.dtype.itemsize + place.offset
                tensor.set_(self._arena, offset, place.size, place.stride)
            self._inputs[place] = tensor, self._taken(tensor)
        return self._inputs[place]

    def _taken(self, tensor: torch.Tensor) -> Any:
        """Let the function take one more tensor."""
        self._given.append(tensor)
        value = self._graph.addInput()
        value.setType(torch._C.TensorType.get())
        return value

    def _insert(self, name: str, values: Sequence[Any], num_results: int = 1) -> Any:
        return self._graph.insertNode(self._graph.create(name, list(values), num_results))

    def _constant(self, value: Any) -> Any:
        try:
            return self._graph.insertConstant(value)
        except (RuntimeError, TypeError) as error:
            raise CannotReplayError(f"{value!r} cannot be on a tape") from error


def _plan(call: Call) -> _Plan:
    """Have a call write its results where they are to be, if it can."""
    if call.func._schema.is_mutable:
        if call.left - call.read:
            raise CannotReplayError(f"{call.name} changes one tensor and makes another")
        return _Plan(call.func, call.args, call.kwargs)
    if call.name in _EMPTY:
        return _Plan(None, (), {})
    if call.func is aten.relu.default:
        return _Plan(aten.clamp_min.out, (*call.args, 0), {"out": call.result})
    if call.func in (aten.clone.default, aten._to_copy.default):
        return _Plan(aten.copy_.default, (call.result, call.args[0]), {})
    if call.name in ("zeros", "zeros_like", "new_zeros"):
        return _Plan(aten.zero_.default, (call.result,), {})
    found = _out_overload(call.func)
    is_unlike = call.name == "native_batch_norm" and call.inputs[0].stride != call.outputs[0].stride
    if found is None or is_unlike:
        return _Plan(call.func, call.args, call.kwargs, is_fresh=True)
    func, names = found
    return _Plan(func, call.args, {**call.kwargs, **dict(zip(names, call.outputs, strict=True))})


@cache
def _out_overload(func: Any) -> tuple[Any, list[str]] | None:
    """The overload with which an operation of its own writes into given tensors, and what they are called."""
    if func._schema.name.partition("::")[2] in _UNFIT:
        return None
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for overload in func.overloadpacket.overloads():
        found = getattr(func.overloadpacket, overload)
        names = [a.name for a in found._schema.arguments if a.is_out]
        taken = [(a.name, str(a.type)) for a in found._schema.arguments if not a.is_out]
        if not names or taken != wanted or len(names) != len(func._schema.returns):
            continue
        # others are generated: they make a new tensor first and copy it
        if torch._C._dispatch_has_kernel_for_dispatch_key(found._name, "CPU"):
            return found, names
    return None


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


def _lifetimes(
    calls: Sequence[Call], constant: Mapping[int, Call], wanted: set[int], num_bytes: Mapping[int, int]
) -> dict[int, _Memory]:
    """The memory that has to be found for what the calls make."""
    memories: dict[int, _Memory] = {}
    for index, call in enumerate(calls):
        for storage in call.left - call.read - constant.keys() - memories.keys():
            memories[storage] = _Memory(num_bytes[storage], index, index)
        for storage in (call.left | call.read) & memories.keys():
            memories[storage].last = index
    for storage in wanted & memories.keys():
        memories[storage].last = len(calls)
    return memories


def _share(index: int, call: Call, plan: _Plan, memories: dict[int, _Memory]) -> None:
    """Let a call that works on each entry by itself overwrite what nobody reads afterwards."""
    if torch.Tag.pointwise not in call.func.tags or call.func._schema.is_mutable or plan.is_fresh:
        return
    outputs, inputs = call.outputs, call.inputs
    own = memories.get(outputs[0].storage) if len(outputs) == 1 else None
    if own is None:
        return
    for place in inputs:
        memory = memories.get(place.storage)
        if memory is None or _root(memory).last != index or memory.num_bytes != own.num_bytes:
            continue
        if place.view == outputs[0].view and sum(p.storage == place.storage for p in inputs) == 1:
            own.shares = memory
            _root(memory).last = own.last
            return


def _arrange(memories: Iterable[_Memory]) -> int:
    """Give each memory its place, the first gap that is wide enough; returns the bytes of all."""
    alive: list[tuple[int, int, _Memory]] = []
    end = 0
    for memory in sorted((m for m in memories if m.shares is None), key=lambda m: m.first):
        alive = [entry for entry in alive if entry[2].last >= memory.first]
        size = -(-memory.num_bytes // _ALIGNMENT) * _ALIGNMENT
        offset = 0
        for begin, stop, _ in alive:
            if begin - offset >= size:
                break
            offset = max(offset, stop)
        memory.offset = offset
        alive = sorted([*alive, (offset, offset + size, memory)], key=lambda entry: entry[0])
        end = max(end, offset + size)
    return end


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


def _overload(schema: str) -> str:
    return schema.partition("(")[0]


def _root(memory: _Memory) -> _Memory:
    while memory.shares is not None:
        memory = memory.shares
    return memory


def _whole(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.Tensor:
    """All of a storage as a tensor."""
    return torch.empty(0, dtype=dtype).set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))
