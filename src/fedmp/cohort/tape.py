"""A computation recorded once, and replayed: the same operations on the same memory, without the Python around them.

A chunk's step is some thirty operations of a few dozen microseconds. Between them the model's forward, autograd and
the batched rules take as long again, and hold Python's lock meanwhile, for which the other threads wait. A `Tape`
keeps just the operations, as they arrive below autograd (`torch.utils._python_dispatch`): views are made once, results
go to memory planned beforehand, where those that do not live at the same time share their places, and torch's own
interpreter runs one operation after another, without Python and its lock.

What is recorded must not depend on anything but the tensors that it reads; `is_same` tells two recordings apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

__all__ = ["CannotReplayError", "Recording", "Tape", "record"]

_ALIGNMENT = 64  # bytes, as torch aligns its own memory
_MOST_FIXED = 4096  # entries of a tensor that comes from nowhere, to be compared by value
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_LIKE = {
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_full",
}  # read shapes, no values
_WRITES_UNTOLD = {"native_batch_norm": (3, 4)}  # arguments that change, which the schema does not say
_MOVES_MEMORY = {"set_", "resize_", "resize_as_"}

T = TypeVar("T")
aten = torch.ops.aten


class CannotReplayError(Exception):
    """What was recorded cannot be replayed."""


class _Place(NamedTuple):
    """A tensor as a view of memory."""

    storage: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Call(NamedTuple):
    """An operation as it was recorded."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any

    @property
    def inputs(self) -> list[torch.Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def outputs(self) -> list[torch.Tensor]:
        return _tensors(self.result)

    @property
    def name(self) -> str:
        return str(self.func._schema.name).partition("::")[2]


class Recording(TorchDispatchMode):
    """The operations under way, in their order; all of their tensors stay alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.refusal = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing of this is compiled, and being kept from it imports torch's compiler (1 s)."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and note it."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            call = _Call(func, args, kwargs or {}, result)
            self.refusal = self.refusal or _refusal(call)
        self.calls.append(call)
        return result


def record(run: Callable[[], T]) -> tuple[T, Recording]:
    """Run something and record its operations, those of a backward in this thread among them."""
    recording = Recording()
    with recording:
        result = run()
    return result, recording


@dataclass(eq=False)
class _Memory:
    """A storage that comes into being on the tape.

    Attributes:
        num_bytes: of it.
        first, last: calls that make it and use it last.
        shares: the memory it lies in, where an operation overwrites what it read.
        offset: in bytes, in the arena; None where each replay brings memory of its own.
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
            self._build(recording.calls, {_storage(t) for t in known}, results)

    def is_same(self, other: Tape) -> bool:
        """Whether both do the same on the same memory."""
        return self._signature == other._signature

    def replay(self) -> None:
        """Do it again, on what the known tensors hold now."""
        with torch.no_grad():
            self._function(*self._tensors)

    def written(self) -> list[torch.Tensor]:
        """The known tensors that it changes, whole."""
        return list(self._written.values())

    def _build(self, calls: Sequence[_Call], known: set[int], results: Sequence[torch.Tensor]) -> None:
        made, fixed = _origins(calls, known)
        constant = _constants(calls, made)
        kept = _needed(calls, {*known, *fixed}, constant, [_storage(t) for t in results])
        self._signature = _signature(kept, made, fixed)
        memories = _lifetimes(kept, constant, [_storage(t) for t in results])
        plans = [_plan(call) for call in kept]
        for index, (call, plan) in enumerate(zip(kept, plans, strict=True)):
            _share(index, call, plan, memories)
            if plan.is_fresh:
                for output in call.outputs:
                    memories.pop(_storage(output), None)
        self.num_bytes = _arrange(memories.values())
        arena = torch.empty(self.num_bytes, dtype=torch.uint8).untyped_storage()
        program = _Program(arena, memories, made - constant)
        for call, plan in zip(kept, plans, strict=True):
            if plan.func is not None:
                program.add(plan, call.result)
        self.results = [program.result(tensor) for tensor in results]
        self._function, self._tensors = program.finish()
        self._written = {
            _storage(t): _whole(t)
            for call in kept
            for t in _changed(call)
            if _storage(t) in known and _storage(t) not in made
        }


class _Plan(NamedTuple):
    """How a call is replayed: `func` None for not at all; `is_fresh` where its results are new tensors each time."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_fresh: bool = False


class _Program:
    """Calls as a function of torch's own interpreter, which runs all of them while the lock is free for others.

    Args:
        arena: memory of what is made on the way.
        memories: where in it each storage lies.
        fleeting: storages that are new in each replay, unless they lie there.
    """

    def __init__(
        self, arena: torch.UntypedStorage, memories: Mapping[int, _Memory], fleeting: set[int]
    ) -> None:
        self._arena, self._memories, self._fleeting = arena, memories, fleeting
        self._graph: Any = torch._C.Graph()
        self._inputs: dict[_Place, tuple[torch.Tensor, Any]] = {}
        self._fresh: dict[int, tuple[_Place, Any]] = {}

    def add(self, plan: _Plan, result: Any) -> None:
        """Add a call, and what it gave when it was recorded."""
        schema = plan.func._schema
        given = {a.name: value for a, value in zip(schema.arguments, plan.args, strict=False)}
        given.update(plan.kwargs)
        values = [self._value(given.get(a.name, a.default_value), a.type) for a in schema.arguments]
        node = self._insert(schema.name, values, max(len(schema.returns), 1))
        if plan.is_fresh:
            found = result if isinstance(result, tuple) else [result]
            for index, tensor in enumerate(found):
                if isinstance(tensor, torch.Tensor):
                    self._fresh[_storage(tensor)] = _place(tensor), node.outputsAt(index)

    def result(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where to read a result after each replay."""
        place = _place(tensor)
        if place.storage in self._fresh:
            kept = torch.empty_like(tensor)
            self._insert("aten::copy_", [self._value(kept), self._value(tensor), self._constant(False)])
            return kept
        return self._input(tensor)[0]

    def finish(self) -> tuple[Callable[..., Any], list[torch.Tensor]]:
        """The function, and what it is to be called with."""
        self._graph.registerOutput(self._constant(None))
        function = torch._C._create_function_from_graph("tape", self._graph)
        return function, [tensor for tensor, _ in self._inputs.values()]

    def _value(self, value: Any, kind: Any = None) -> Any:
        """A value in the graph."""
        if isinstance(value, torch.Tensor):
            place = _place(value)
            if place.storage not in self._fresh:
                return self._input(value)[1]
            base, made = self._fresh[place.storage]
            if place == base:
                return made
            where = map(self._constant, (list(place.size), list(place.stride), place.offset))
            return self._insert("aten::as_strided", [made, *where]).outputsAt(0)
        if isinstance(value, list | tuple) and (not value or not isinstance(value[0], int | float)):
            node = self._insert("prim::ListConstruct", [self._value(item) for item in value])
            node.outputsAt(0).setType(kind)
            return node.outputsAt(0)
        if isinstance(value, int) and not isinstance(value, bool) and str(kind) == "float":
            value = float(value)
        return self._constant(list(value) if isinstance(value, tuple) else value)

    def _input(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """A tensor that is there from one replay to the next, as a plain one, and as a value in the graph."""
        place = _place(tensor)
        if place not in self._inputs:
            view, memory = torch.empty(0, dtype=place.dtype), self._memories.get(place.storage)
            if memory is None:
                assert place.storage not in self._fleeting
                view.set_(tensor.untyped_storage(), place.offset, place.size, place.stride)
            else:
                first = _root(memory).offset
                assert first is not None
                offset = first // place.dtype.itemsize + place.offset
                view.set_(self._arena, offset, place.size, place.stride)
            value = self._graph.addInput()
            value.setType(torch._C.TensorType.get())
            self._inputs[place] = view, value
        return self._inputs[place]

    def _insert(self, name: str, values: Sequence[Any], num_results: int = 1) -> Any:
        return self._graph.insertNode(self._graph.create(name, list(values), num_results))

    def _constant(self, value: Any) -> Any:
        try:
            return self._graph.insertConstant(value)
        except (RuntimeError, TypeError) as error:
            raise CannotReplayError(f"{value!r} cannot be on a tape") from error


def _plan(call: _Call) -> _Plan:
    """Have a call write its results where they are to be, if it can."""
    if call.func._schema.is_mutable:
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
    if found is None:
        return _Plan(call.func, call.args, call.kwargs, is_fresh=True)
    func, names = found
    return _Plan(func, call.args, {**call.kwargs, **dict(zip(names, call.outputs, strict=True))})


@cache
def _out_overload(func: Any) -> tuple[Any, list[str]] | None:
    """The overload with which an operation of its own writes into given tensors, and what they are called."""
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


def _refusal(call: _Call) -> str:
    """Why a call cannot be on a tape; empty if it can."""
    if not isinstance(call.func, torch._ops.OpOverload):
        return f"{call.func} is no plain operation"
    tags = set(call.func.tags)
    if tags & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}:
        return f"{call.name} lets values decide what is computed"
    if torch.Tag.nondeterministic_seeded in tags:
        return f"{call.name} draws random numbers"
    if call.name in _MOVES_MEMORY:
        return f"{call.name} moves a tensor"
    for tensor in (*call.inputs, *call.outputs):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype.is_complex:
            return f"{call.name} of a tensor that is not plain"
        if tensor.untyped_storage().nbytes() == 0:
            return f"{call.name} of an empty tensor"
    return ""


def _origins(calls: Sequence[_Call], known: set[int]) -> tuple[set[int], dict[int, torch.Tensor]]:
    """Storages that come into being on the way, and small ones that come from nowhere, like a literal's.

    Raises:
        CannotReplayError: a large one comes from nowhere.
    """
    made: set[int] = set()
    fixed: dict[int, torch.Tensor] = {}
    for call in calls:
        read = set(map(_storage, call.inputs))
        for tensor in call.inputs:
            storage = _storage(tensor)
            if storage not in made and storage not in known and storage not in fixed:
                if tensor.untyped_storage().nbytes() > _MOST_FIXED * tensor.itemsize:
                    raise CannotReplayError(f"{call.name} reads a tensor that was not there before")
                fixed[storage] = _whole(tensor).clone()
        made.update(storage for storage in map(_storage, call.outputs) if storage not in read | known)
    changed = {_storage(t) for call in calls for t in _changed(call)}
    if changed & fixed.keys():
        raise CannotReplayError("a tensor that was not there before is changed")
    return made, fixed


def _constants(calls: Sequence[_Call], made: set[int]) -> set[int]:
    """Storages that hold the same after every replay: made of no tensor's values and never changed."""
    found: set[int] = set()
    for call in calls:
        if not call.inputs or call.name in _LIKE:
            found.update(set(map(_storage, call.outputs)) & made)
        found.difference_update(map(_storage, _changed(call)))
    return found


def _needed(
    calls: Sequence[_Call], lasting: set[int], constant: set[int], results: Sequence[int]
) -> list[_Call]:
    """The calls whose results anything depends on; views are none of them."""
    needed, kept = {*lasting, *results}, []
    for call in reversed(calls):
        read, left = set(map(_storage, call.inputs)), set(map(_storage, call.outputs))
        changed = set(map(_storage, _changed(call)))
        is_view = not changed and left <= read
        if is_view or left <= constant or not (changed | left - read) & needed:
            continue
        kept.append(call)
        needed |= read
    return kept[::-1]


def _lifetimes(calls: Sequence[_Call], constant: set[int], results: Sequence[int]) -> dict[int, _Memory]:
    """The memory that has to be found for what the calls make."""
    memories: dict[int, _Memory] = {}
    for index, call in enumerate(calls):
        read = set(map(_storage, call.inputs))
        for tensor in call.outputs:
            storage = _storage(tensor)
            if storage not in read and storage not in memories and storage not in constant:
                memories[storage] = _Memory(tensor.untyped_storage().nbytes(), index, index)
        for tensor in (*call.inputs, *call.outputs):
            if _storage(tensor) in memories:
                memories[_storage(tensor)].last = index
    for storage in results:
        if storage in memories:
            memories[storage].last = len(calls)
    return memories


def _share(index: int, call: _Call, plan: _Plan, memories: dict[int, _Memory]) -> None:
    """Let a call that works on each entry by itself overwrite what nobody reads afterwards."""
    if torch.Tag.pointwise not in call.func.tags or plan.is_fresh or len(call.outputs) != 1:
        return
    (output,) = call.outputs
    own = memories.get(_storage(output))
    if own is None or call.func._schema.is_mutable:
        return
    wanted = _place(output)
    for tensor in call.inputs:
        place, memory = _place(tensor), memories.get(_storage(tensor))
        if memory is None or _root(memory).last != index or memory.num_bytes != own.num_bytes:
            continue
        if place[1:] == wanted[1:] and sum(_storage(t) == place.storage for t in call.inputs) == 1:
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


def _signature(calls: Sequence[_Call], made: set[int], fixed: Mapping[int, torch.Tensor]) -> list[Any]:
    """What the calls do, to be compared with another recording's."""
    labels: dict[int, Any] = {}

    def label(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        place = _place(value)
        if place.storage in fixed:
            held = fixed[place.storage]
            labels.setdefault(place.storage, (held.dtype, tuple(held.tolist())))
        elif place.storage in made:
            labels.setdefault(place.storage, f"#{len(labels)}")
        return labels.get(place.storage, place.storage), *place[1:]

    found = []
    for call in calls:
        leaves, shape = tree_flatten((call.args, dict(call.kwargs), call.result))
        found.append((call.func, shape, [label(leaf) for leaf in leaves]))
    return found


def _changed(call: _Call) -> list[torch.Tensor]:
    """The tensors among a call's inputs that it writes to."""
    schema = call.func._schema
    found = [t for place in _WRITES_UNTOLD.get(call.name, ()) for t in _tensors(call.args[place])]
    if not schema.is_mutable:
        return found
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = call.args[place] if place < len(call.args) else call.kwargs.get(argument.name)
            found += _tensors(given)
    return found


def _root(memory: _Memory) -> _Memory:
    while memory.shares is not None:
        memory = memory.shares
    return memory


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _place(tensor: torch.Tensor) -> _Place:
    return _Place(
        _storage(tensor), int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype
    )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of the memory that a tensor is a view of."""
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype)
    return whole.set_(storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))
