"""Memory for what comes into being on a tape: those that do not live at the same time share their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedmp.cohort.recording import Call

__all__ = ["Region", "arrange", "lifetimes", "share"]

_ALIGNMENT = 64  # bytes, as torch aligns its own memory


@dataclass(eq=False)
class Region:
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
    shares: Region | None = None
    offset: int | None = None

    @property
    def root(self) -> Region:
        """The memory in whose place it lies, which may be itself."""
        return self if self.shares is None else self.shares.root


def lifetimes(
    calls: Sequence[Call], constant: Mapping[int, Call], wanted: set[int], num_bytes: Mapping[int, int]
) -> dict[int, Region]:
    """The memory that has to be found for what the calls make."""
    memories: dict[int, Region] = {}
    for index, call in enumerate(calls):
        for storage in call.left - call.read - constant.keys() - memories.keys():
            memories[storage] = Region(num_bytes[storage], index, index)
        for storage in (call.left | call.read) & memories.keys():
            memories[storage].last = index
    for storage in wanted & memories.keys():
        memories[storage].last = len(calls)
    return memories


def share(index: int, call: Call, memories: Mapping[int, Region]) -> None:
    """Let a call that works on each entry by itself overwrite what nobody reads afterwards."""
    if torch.Tag.pointwise not in call.func.tags or call.func._schema.is_mutable:
        return
    outputs, inputs = call.outputs, call.inputs
    own = memories.get(outputs[0].storage) if len(outputs) == 1 else None
    if own is None:
        return
    for place in inputs:
        memory = memories.get(place.storage)
        if memory is None or memory.root.last != index or memory.num_bytes != own.num_bytes:
            continue
        if place.view == outputs[0].view and sum(p.storage == place.storage for p in inputs) == 1:
            own.shares = memory
            memory.root.last = own.last
            return


def arrange(memories: Iterable[Region]) -> int:
    """Give each memory its place, the first gap that is wide enough; returns the bytes of all."""
    alive: list[tuple[int, int, Region]] = []
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
