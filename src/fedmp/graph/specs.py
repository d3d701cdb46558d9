"""The tensors of a model, before anything is traced."""

from __future__ import annotations

import torch
from torch import nn

from fedmp.graph.layer_graph import StateSpec

__all__ = ["named_tensors", "state_specs"]


def state_specs(model: nn.Module) -> dict[str, StateSpec]:
    """Parameters, then buffers, in the model's order; one that has several names stands under its first."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    buffers = list(model.named_buffers(remove_duplicate=False))
    persistent = set(model.state_dict(keep_vars=True))
    names: dict[int, list[str]] = {}
    for name, tensor in parameters + buffers:
        names.setdefault(id(tensor), []).append(name)
    specs: dict[str, StateSpec] = {}
    for kind, tensors in (("parameter", parameters), ("buffer", buffers)):
        for _, tensor in tensors:
            aliases = tuple(names[id(tensor)])
            specs.setdefault(
                aliases[0],
                StateSpec(
                    name=aliases[0],
                    aliases=aliases,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    kind=kind,  # type: ignore[arg-type]
                    is_persistent=aliases[0] in persistent,
                    requires_grad=tensor.requires_grad and kind == "parameter",
                ),
            )
    return specs


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, by each of their names."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}
