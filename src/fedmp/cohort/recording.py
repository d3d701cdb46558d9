"""The operations of a computation, as they arrive below autograd, those of a backward among them.

Whatever wrote them: a model's own forward, batched rules, autograd, an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["Call", "Place", "Recording", "record", "storage_of"]

_FIXED = {
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_full",
}  # read shapes, no values
_WRITES_UNTOLD = {"native_batch_norm": (3, 4)}  # arguments that change, which the schema does not say
_DROPOUT_AT = {"_scaled_dot_product_flash_attention_for_cpu": 3}  # the argument; without, nothing is random
_MOVES_MEMORY = {"set_", "resize_", "resize_as_"}

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A tensor as a view of a storage."""

    storage: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def view(self) -> tuple[Any, ...]:
        """The same of whatever storage."""
        return self.offset, self.size, self.stride, self.dtype


@dataclass(eq=False)
class Call:
    """An operation as it was recorded, with the places of its tensors."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any

    @cached_property
    def inputs(self) -> list[Place]:
        return _places((self.args, self.kwargs))

    @cached_property
    def outputs(self) -> list[Place]:
        return _places(self.result)

    @property
    def name(self) -> str:
        return str(self.func._schema.name).partition("::")[2]

    @cached_property
    def read(self) -> set[int]:
        """Storages of the inputs."""
        return {place.storage for place in self.inputs}

    @cached_property
    def left(self) -> set[int]:
        """Storages of the outputs."""
        return {place.storage for place in self.outputs}

    @cached_property
    def changed(self) -> set[int]:
        """Storages among the inputs' that it writes to."""
        schema = self.func._schema
        places = [p for index in _WRITES_UNTOLD.get(self.name, ()) for p in _places(self.args[index])]
        for index, argument in enumerate(schema.arguments if schema.is_mutable else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self.args[index] if index < len(self.args) else self.kwargs.get(argument.name)
                places += _places(given)
        return {place.storage for place in places}

    @property
    def is_fixed(self) -> bool:
        """Whether its results depend on no tensor's values."""
        return not self.inputs or self.name in _FIXED


class Recording(TorchDispatchMode):
    """The operations under way, in their order. Their tensors are not kept, but for those that were there before.

    Attributes:
        calls: the operations.
        refusal: why they cannot be replayed; empty if they can.
        num_bytes: of each storage.
        held: storages that were there before, or are the same each time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.refusal = ""
        self.num_bytes: dict[int, int] = {}
        self.held: dict[int, torch.UntypedStorage] = {}
        self._seen: list[StorageWeakRef] = []  # as long as these are there, no number is given twice

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
            if not self.refusal:
                self._note(func, args, kwargs or {}, result)
        return result

    def place(self, tensor: torch.Tensor) -> Place:
        """Where a tensor lies that was recorded and is still there."""
        storage = tensor.untyped_storage()
        number = int(storage._cdata)
        if number not in self.num_bytes:
            self.num_bytes[number] = storage.nbytes()
            self._seen.append(StorageWeakRef(storage))
        size, stride = tuple(tensor.shape), tensor.stride()
        return Place(number, int(tensor.storage_offset()), size, stride, tensor.dtype)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        self.refusal = _refusal(func, args, [*inputs, *outputs])
        if self.refusal:
            self.calls.clear()
            return
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if int(storage._cdata) not in self.num_bytes:
                self.held[int(storage._cdata)] = storage

        def placed(value: Any) -> Any:
            return self.place(value) if isinstance(value, torch.Tensor) else value

        call = Call(func, *(tree_map(placed, value) for value in (args, dict(kwargs), result)))
        if call.is_fixed:
            self.held.update((int(t.untyped_storage()._cdata), t.untyped_storage()) for t in outputs)
        if (
            torch.Tag.inplace_view not in func.tags
        ):  # a new shape shows in the places of the calls that follow
            self.calls.append(call)


def record(run: Callable[[], T]) -> tuple[T, Recording]:
    """Run something and record its operations, those of a backward in this thread among them."""
    recording = Recording()
    with recording:
        result = run()
    return result, recording


def _refusal(func: Any, args: tuple[Any, ...], tensors: Sequence[torch.Tensor]) -> str:
    """Why a call cannot be on a tape; empty if it can."""
    if not isinstance(func, torch._ops.OpOverload):
        return f"{func} is no plain operation"
    name, tags = str(func._schema.name).partition("::")[2], set(func.tags)
    if name == "index" and all(tensor.dtype not in (torch.bool, torch.uint8) for tensor in tensors[1:]):
        tags.discard(torch.Tag.dynamic_output_shape)  # only a mask decides how much is picked
    if tags & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}:
        return f"{name} lets values decide what is computed"
    dropout = args[_DROPOUT_AT[name] :][:1] if name in _DROPOUT_AT else (1.0,)
    if torch.Tag.nondeterministic_seeded in tags and dropout not in ((), (0.0,)):
        return f"{name} draws random numbers"
    if name in _MOVES_MEMORY:
        return f"{name} moves a tensor"
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype.is_complex:
            return f"{name} of a tensor that is not plain"
    return ""


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _places(value: Any) -> list[Place]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Place)]


def storage_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
