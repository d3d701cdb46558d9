"""A module whose parameters are many clients' at once.

Of each parameter the clients' parts lie side by side: a batched product writes such a tensor at once, but rows of a
wider one client by client.

Shape letters: K clients of a chunk, P trained parameters of one client.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from fedmp.cohort.registry import CannotStackError, module_rule_of
from fedmp.cohort.slot import Arrived, Slot, Step
from fedmp.cohort.stacked import Stacked, leaf_of, stack

__all__ = ["ByParameter", "FlatLayout", "StackedModule", "flat_layout", "own_statistics"]


class Span(NamedTuple):
    """Where a parameter lies in a flat row."""

    begin: int
    end: int
    shape: torch.Size


@dataclass(frozen=True)
class FlatLayout:
    """Where each trained parameter of a model lies in a client's flat row.

    Attributes:
        names: canonical names, in the model's order.
        shapes: of each.
        offsets: where each begins, and the end of the last.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    offsets: tuple[int, ...]

    @cached_property
    def spans(self) -> Mapping[str, Span]:
        """Where each one lies, by name."""
        ends = zip(self.names, self.offsets, self.offsets[1:], self.shapes, strict=False)
        return {name: Span(begin, end, shape) for name, begin, end, shape in ends}

    @property
    def size(self) -> int:
        """P, entries of one client's row."""
        return self.offsets[-1]

    @property
    def slices(self) -> list[slice]:
        """Where each parameter lies in a row."""
        return list(map(slice, self.offsets, self.offsets[1:]))

    def by_name(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each parameter of a row, [P], as a view."""
        return {name: row[begin:end].view(shape) for name, (begin, end, shape) in self.spans.items()}


class ByParameter:
    """Something of each entry of many clients' parameters.

    Args:
        layout: of the parameters.
        num_clients: K.
        dtype: of the entries.

    Attributes:
        flat: [K P], all of it.
        parts: [K, n] of each parameter of n entries, in the layout's order, as views.
    """

    def __init__(self, layout: FlatLayout, num_clients: int, dtype: torch.dtype) -> None:
        self._layout = layout
        self.flat = torch.zeros(num_clients * layout.size, dtype=dtype)
        sizes = [num_clients * shape.numel() for shape in layout.shapes]
        self.parts: list[torch.Tensor] = [part.view(num_clients, -1) for part in self.flat.split(sizes)]

    def of(self, name: str) -> torch.Tensor:
        """[K, n] of one parameter."""
        return self.parts[self._layout.names.index(name)]

    def views(self, first: int, stop: int) -> list[torch.Tensor]:
        """[stop - first, ...] of each parameter, in its shape, as views."""
        pairs = zip(self.parts, self._layout.shapes, strict=True)
        return [part[first:stop].view(-1, *shape) for part, shape in pairs]

    def rows(self, num_clients: int) -> torch.Tensor:
        """[num_clients, P] a copy of the first so many clients' rows."""
        return torch.cat([part[:num_clients] for part in self.parts], 1)

    def load(self, row: torch.Tensor, num_clients: int) -> None:
        """Give the first so many clients the same row, [P]."""
        for part, span in zip(self.parts, self._layout.slices, strict=True):
            part[:num_clients].copy_(row[span])

    def clear(self, num_clients: int) -> None:
        """Set the first so many clients' entries to zero."""
        for part in self.parts:
            part[:num_clients].zero_()


def flat_layout(model: nn.Module) -> FlatLayout:
    """The layout of a model's trained parameters; one that has several names lies under its first."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    offsets = [0]
    for _, parameter in named:
        offsets.append(offsets[-1] + parameter.numel())
    return FlatLayout(tuple(name for name, _ in named), tuple(p.shape for _, p in named), tuple(offsets))


@dataclass
class _Range:
    """The parameters of some neighbouring clients of the chunk, ready to be put into the module."""

    leaves: list[Stacked]
    slots: list[Slot]
    buffers: dict[str, Stacked] = field(default_factory=dict)
    step: int = -1  # the last one that its slots are ready for


class StackedModule:
    """A copy of a model that computes many clients at once.

    Args:
        model: the model; it is copied, without its weights.
        layout: of its trained parameters.
        num_clients: K, the most clients that it can hold.
        num_buffers: of the optimizer.

    Attributes:
        parameters, gradients: of the clients.
        state: of the optimizer, alike.
        buffers: of statistics that differ by client, [K, ...] by name.
        start: [P] what all clients were handed out.
        shares: [K] of the clients in sums over them.
        sums: [P] the last step's gradients times these, summed, where they arrived so.
        step: how gradients are taken in.
    """

    def __init__(self, model: nn.Module, layout: FlatLayout, num_clients: int, num_buffers: int) -> None:
        self.module = _copy_without_weights(model)
        self.module.train()
        self.layout = layout
        dtype = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float32)
        self.parameters, self.gradients, *self.state = (
            ByParameter(layout, num_clients, dtype) for _ in range(2 + num_buffers)
        )
        self.buffers = {
            name: tensor.new_zeros((num_clients, *tensor.shape))
            for name, tensor in own_statistics(model).items()
        }
        self.start, self.sums = torch.zeros(2, layout.size, dtype=dtype)
        self.shares = torch.zeros(num_clients, dtype=dtype)
        self.step = Step()
        self._places = _places(model, layout.names)
        self._buffer_places = _buffer_places(model, self.buffers)
        self._ranges: dict[tuple[int, int], _Range] = {}
        self._bound: tuple[int, int] | None = None
        self._num_steps = 0
        self._arrived = Arrived.NOTHING  # before a step's first pass
        self._shared = {name: (buffer, buffer._version) for name, buffer in self._shared_buffers()}
        for module in self.module.modules():
            rule = module_rule_of(module)
            if rule is not None:
                module.forward = _by_rule(module, rule)

    def load(self, start: torch.Tensor, buffers: Mapping[str, torch.Tensor], num_clients: int) -> None:
        """Give the first so many clients the same weights, [P], and statistics; [K, ...] where they differ."""
        self.parameters.load(start, num_clients)
        self.start.copy_(start)
        for name, buffer in self.buffers.items():
            buffer[:num_clients].copy_(buffers[name])

    def run(self, inputs: torch.Tensor, first: int, stop: int) -> Any:
        """The model's result for clients `first` to `stop`, stacked; autograd can go back through it.

        Args:
            inputs: [stop - first, B, ...].

        Raises:
            CannotStackError: the forward does what cannot be done for many clients at once.
        """
        bound = self._range(first, stop)
        self._bind(first, stop, bound)
        for slot in bound.slots:
            slot.num_uses = 0
        result = self.module(stack(inputs))
        for name, (buffer, version) in self._shared.items():
            if buffer._version != version:
                raise CannotStackError(f"the forward changes the buffer {name}")
        return result

    def begin_step(self, step: Step | None = None, clients: int = 0, *, is_cleared: bool = False) -> None:
        """Forget the last step's gradients; `is_cleared` sets those of the first so many clients to zero."""
        if is_cleared:
            self.gradients.clear(clients)
        self.step = step or Step()
        self._arrived = Arrived.GRADIENT if is_cleared else Arrived.NOTHING
        self._num_steps += 1

    def collect(self, first: int, stop: int) -> None:
        """After a backward: take in the gradients that autograd left at the parameters."""
        bound = self._ranges[first, stop]
        with torch._C.DisableTorchFunctionSubclass():
            for leaf, slot in zip(bound.leaves, bound.slots, strict=True):
                if leaf.grad is not None:
                    slot.add(leaf.grad, is_over=True)
                    leaf.grad = None

    def arrived(self, first: int, stop: int) -> tuple[Arrived, ...]:
        """What has become of the gradients of these clients' parameters in this step."""
        return tuple(slot.arrived for slot in self._range(first, stop).slots)

    def mark_arrived(self, first: int, stop: int, arrived: Sequence[Arrived]) -> None:
        """Say so, where something else than `run` and `collect` took them in."""
        for slot, own in zip(self._range(first, stop).slots, arrived, strict=True):
            slot.arrived = own

    def tensors(self) -> list[torch.Tensor]:
        """All that training may change: weights, gradients, optimizer state, and the model's own tensors."""
        own = [*self.module.parameters(), *self.module.buffers()]
        flat = [each.flat for each in (self.parameters, self.gradients, *self.state)]
        return [*flat, self.start, self.sums, self.shares, *self.buffers.values(), *own]

    def with_gradient(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Places, in the layout, of the parameters whose gradient waits for a step."""
        arrived = zip(*(self.arrived(first, stop) for first, stop in ranges), strict=True)
        return [place for place, own in enumerate(arrived) if Arrived.GRADIENT in own]

    def _bind(self, first: int, stop: int, bound: _Range) -> None:
        key = (first, stop)
        if key == self._bound:
            return
        for places, tensor in zip(self._places, bound.leaves, strict=True):
            for path, name in places:
                self.module.get_submodule(path)._parameters[name] = tensor  # type: ignore[assignment]
        for full, (path, name) in self._buffer_places.items():
            self.module.get_submodule(path)._buffers[name] = bound.buffers[full]
        self._bound = key

    def _range(self, first: int, stop: int) -> _Range:
        """Some clients' parameters, ready for the present step."""
        bound = self._ranges.get((first, stop))
        if bound is None:
            bound = self._ranges[first, stop] = self._make_range(first, stop)
        if bound.step != self._num_steps:
            bound.step = self._num_steps
            for slot in bound.slots:
                slot.begin(self.step, self._arrived)
        return bound

    def _make_range(self, first: int, stop: int) -> _Range:
        weights = self.parameters.views(first, stop)
        leaves, slots = [leaf_of(weight) for weight in weights], list[Slot]()
        starts, sums = (list(self.layout.by_name(row).values()) for row in (self.start.data, self.sums.data))
        gradients, shares = self.gradients.views(first, stop), self.shares[first:stop]
        for place, leaf in enumerate(leaves):
            slot = leaf.slot = Slot(gradients[place], weights[place], starts[place], sums[place], shares)
            slots.append(slot)
        buffers = {name: stack(buffer[first:stop]) for name, buffer in self.buffers.items()}
        return _Range(leaves, slots, buffers)

    def _shared_buffers(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, buffer) for name, buffer in self.module.named_buffers() if name not in self.buffers]


def own_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that training changes, by canonical name: those of normalization layers."""
    names = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _copy_without_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the tensors of the original."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _places(model: nn.Module, names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """For each parameter the modules and attributes that hold it."""
    by_tensor: dict[int, list[tuple[str, str]]] = {}
    first: dict[str, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                by_tensor.setdefault(id(parameter), []).append((path, name))
                first[f"{path}.{name}" if path else name] = id(parameter)
    return [by_tensor[first[name]] for name in names]


def _buffer_places(model: nn.Module, names: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {name: (name.rpartition(".")[0], name.rpartition(".")[2]) for name in names}


def _by_rule(module: nn.Module, rule: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        for parameter in module.parameters():
            if isinstance(parameter, Stacked) and parameter.slot is not None:
                parameter.slot.num_uses += 2  # or more: who knows
        with torch._C.DisableTorchFunctionSubclass():
            result = rule(module, *args, **kwargs)
            return result.as_subclass(Stacked) if isinstance(result, torch.Tensor) else result

    return forward
