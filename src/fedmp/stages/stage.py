"""A stage as an `nn.Module`: a blueprint with weights, under the names they have in the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fedmp.graph.batch import depends_on_batch, rules_out, size_at
from fedmp.graph.portable import to_plain
from fedmp.stages.blueprint import StageBlueprint, ValueSpec

__all__ = ["Stage"]


class Stage(nn.Module):
    """A contiguous piece of a model, trained on one device.

    Its parameters and buffers carry the whole model's names, so `state_dict`, optimizers and
    `train()`/`eval()` work as on the model itself.

    Args:
        blueprint: what the stage computes.
        tensors: its state by canonical name; None leaves the weights on the meta device, without
            memory, until `materialize`.
    """

    def __init__(self, blueprint: StageBlueprint, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self._blueprint = blueprint
        self._slots: dict[str, tuple[nn.Module, str]] = {}
        self._accepted: set[Any] = set()
        self._install(tensors if tensors is not None else _empty(blueprint, torch.device("meta")))

    @property
    def blueprint(self) -> StageBlueprint:
        """What the stage computes, owns, takes and returns."""
        return self._blueprint

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage.

        Args:
            *args, **kwargs: the model's own arguments for the first stage; for the others, what the
                stage before returned.

        Returns:
            The model's own result from the last stage; a tuple of the live tensors from the others.
        """
        tensors: Sequence[Any] = self.flatten(args, kwargs) if self._blueprint.is_first else args
        results = self.run(tensors)
        if not self._blueprint.is_last:
            return results
        return tree_unflatten(list(results), self._blueprint.program(training=self.training).out_spec)

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Like `forward`, with flat tensors in and a flat tuple out."""
        program = self._blueprint.program(training=self.training)
        if self._blueprint.is_first:
            self._check_sizes(tensors)
        return program.module(*self.state_tensors(program.state), *tensors)  # type: ignore[no-any-return]

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors among the model's arguments, in graph order.

        Raises:
            ValueError: the arguments differ in structure, or in a constant, from the example inputs.
        """
        spec = self._blueprint.in_spec
        names = list(spec.child(1).context)
        if sorted(names) != sorted(kwargs):
            raise ValueError(f"the model was traced with keyword inputs {names}, not {list(kwargs)}")
        leaves, given = tree_flatten(to_plain((args, {name: kwargs[name] for name in names})))
        if given != spec:
            raise ValueError(f"the model was traced with inputs {spec}, not {given}; trace it for these")
        constants = self._blueprint.constants
        for position, value in constants.items():
            if leaves[position] is not value and leaves[position] != value:
                raise ValueError(
                    f"input {position} was the constant {value!r} when the model was traced, "
                    f"not {leaves[position]!r}; trace it for this value"
                )
        return [leaf for position, leaf in enumerate(leaves) if position not in constants]

    def state_tensors(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Its tensors by canonical name, parameters, buffers and constants alike."""
        slots = self._slots
        return [_read(*slots[name]) for name in names]

    def owned_state(self) -> dict[str, torch.Tensor]:
        """The tensors that the stage answers for, detached, by canonical name."""
        names = self._blueprint.owned
        return {name: tensor.detach() for name, tensor in zip(names, self.state_tensors(names), strict=True)}

    def materialize(self, device: torch.device | str) -> Stage:
        """Give the weights memory on `device`, with undefined values; returns itself."""
        self._install(_empty(self._blueprint, torch.device(device)))
        return self

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the weights, in place.

        Args:
            tensors: by canonical name; exactly the names in the blueprint's `state`.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape.
        """
        wanted = self._blueprint.state
        if set(tensors) != set(wanted):
            missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
            raise ValueError(f"stage {self._blueprint.index}: missing {missing}, unknown {unknown}")
        with torch.no_grad():
            for name, target in zip(wanted, self.state_tensors(list(wanted)), strict=True):
                if tensors[name].shape != target.shape:
                    raise ValueError(
                        f"stage {self._blueprint.index}: {name} has shape {tuple(target.shape)}, "
                        f"not {tuple(tensors[name].shape)}"
                    )
                target.copy_(tensors[name])

    def _check_sizes(self, tensors: Sequence[torch.Tensor]) -> None:
        """Refuse inputs for which the trace would be wrong."""
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        key = (self.training, shapes)
        if key in self._accepted:
            return
        program = self._blueprint.program(training=self.training)
        traced = self._blueprint.traced_batch_size
        batch_size = _batch_size(program.inputs, shapes, traced)
        expected = tuple(spec.shape(batch_size) for spec in program.inputs)
        if shapes != expected:
            raise ValueError(
                f"the model was traced with inputs of shapes {[spec.shape(traced) for spec in program.inputs]}, "
                f"not {list(shapes)}; only the batch dim may differ"
                + (
                    ""
                    if any(depends_on_batch(dim) for spec in program.inputs for dim in spec.dims)
                    else ", and not even that"
                )
                + " (the forward fixes it); trace the model for these shapes"
            )
        for rule in program.rules:
            if rules_out(rule, batch_size):
                raise ValueError(
                    f"the model was traced with {traced} samples, shapes "
                    f"{[spec.shape(traced) for spec in program.inputs]}; with {batch_size} samples, shapes "
                    f"{list(shapes)}, its forward may take another path ({rule} does not hold); trace it for "
                    f"that batch size, or use batches for which this holds"
                )
        self._accepted.add(key)

    def _install(self, tensors: Mapping[str, torch.Tensor]) -> None:
        owned = set(self._blueprint.owned)
        for name, spec in self._blueprint.state.items():
            for alias in spec.aliases if name in owned else (name,):
                slot = _slot(self, alias)
                _write(*slot, tensors[name], spec.is_persistent)
                self._slots.setdefault(name, slot)

    def extra_repr(self) -> str:
        """Its place in the pipeline."""
        return f"stage {self._blueprint.index} of {self._blueprint.num_stages}"


def _batch_size(specs: Sequence[ValueSpec], shapes: Sequence[tuple[int, ...]], traced: int) -> int:
    """The batch size that the inputs' shapes show."""
    for spec, shape in zip(specs, shapes, strict=True):
        for dim, size in zip(spec.dims, shape, strict=False):
            if depends_on_batch(dim) and size_at(dim, 1):
                return size // size_at(dim, 1)
    return traced


def _empty(blueprint: StageBlueprint, device: torch.device) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in blueprint.state.items():
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
        if spec.kind == "parameter":
            tensor = nn.Parameter(tensor, requires_grad=spec.requires_grad)
        tensors[name] = tensor
    return tensors


def _slot(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the attribute that `path` names; modules on the way are made as needed."""
    *parents, leaf = path.split(".")
    module = root
    for name in parents:
        child = module._modules.get(name)
        if child is None:
            child = nn.Module()
            module.add_module(name, child)
        module = child
    return module, leaf


def _write(module: nn.Module, name: str, tensor: torch.Tensor, is_persistent: bool) -> None:
    if isinstance(tensor, nn.Parameter):
        module._parameters.pop(name, None)
        module.register_parameter(name, tensor)
    else:
        module._buffers.pop(name, None)
        module.register_buffer(name, tensor, persistent=is_persistent)


def _read(module: nn.Module, name: str) -> torch.Tensor:
    tensor: torch.Tensor | None = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers[name]
    assert tensor is not None
    return tensor
