"""A tape's calls as a function of torch's own interpreter: how each is run again, and where its results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from fedmp.cohort.recording import Call, Place
from fedmp.cohort.tape_memory import Region

__all__ = ["CannotReplayError", "Plan", "Program", "plan_of"]

_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# whose variants that write into given tensors make other shapes of them, or are not told from other overloads
_UNFIT = {
    *("binary_cross_entropy", "huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss", "soft_margin_loss"),
    *("linalg_qr", "max", "min"),
}
aten = torch.ops.aten


class CannotReplayError(Exception):
    """What was recorded cannot be replayed."""


class Plan(NamedTuple):
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


class Program:
    """Calls as a function of torch's own interpreter, which runs all of them while the lock is free for others.

    Args:
        arena: memory of what is made on the way.
        memories: where in it each storage lies.
        held: storages that are there before. All others are new in each replay.
    """

    def __init__(
        self,
        arena: torch.UntypedStorage,
        memories: Mapping[int, Region],
        held: Mapping[int, torch.UntypedStorage],
    ) -> None:
        self._arena, self._memories, self._held = arena, memories, held
        self._graph: Any = torch._C.Graph()
        self._given: list[torch.Tensor] = []
        self._inputs: dict[Place, tuple[torch.Tensor, Any]] = {}
        self._fresh: dict[int, tuple[Place, Any]] = {}

    def add(self, plan: Plan, result: Any) -> None:
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
                first = memory.root.offset
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


def plan_of(call: Call) -> Plan:
    """Have a call write its results where they are to be, if it can.

    Raises:
        CannotReplayError: it changes one tensor and makes another.
    """
    if call.func._schema.is_mutable:
        if call.left - call.read:
            raise CannotReplayError(f"{call.name} changes one tensor and makes another")
        return Plan(call.func, call.args, call.kwargs)
    if call.name in _EMPTY:
        return Plan(None, (), {})
    if call.func is aten.relu.default:
        return Plan(aten.clamp_min.out, (*call.args, 0), {"out": call.result})
    if call.func in (aten.clone.default, aten._to_copy.default):
        return Plan(aten.copy_.default, (call.result, call.args[0]), {})
    if call.name in ("zeros", "zeros_like", "new_zeros"):
        return Plan(aten.zero_.default, (call.result,), {})
    found = _out_overload(call.func)
    is_unlike = call.name == "native_batch_norm" and call.inputs[0].stride != call.outputs[0].stride
    if found is None or is_unlike:
        return Plan(call.func, call.args, call.kwargs, is_fresh=True)
    func, names = found
    return Plan(func, call.args, {**call.kwargs, **dict(zip(names, call.outputs, strict=True))})


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


def _overload(schema: str) -> str:
    return schema.partition("(")[0]
