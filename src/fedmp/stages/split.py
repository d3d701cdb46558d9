"""Split a model by a plan, put stage states together again, and run stages in one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedmp.errors import PlanError
from fedmp.graph import CutRules, LayerGraph, named_tensors, trace
from fedmp.records import Plan
from fedmp.stages.blueprint import draw_blueprints
from fedmp.stages.stage import Stage

__all__ = ["merge", "model_state", "run_stages", "split", "split_graph"]


def split(
    model: nn.Module,
    plan: Plan,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    leaves: Sequence[str] = (),
    cut_rules: CutRules | None = None,
) -> list[nn.Module]:
    """Split a model into the stages of a plan.

    Args:
        model: the model that was partitioned, or another of the same architecture.
        plan: from `fedmp.partition`, or read from JSON.
        args, kwargs: example inputs; needed only for a plan that was read from JSON.
        leaves, cut_rules: as they were given to `trace`; for such a plan, too.

    Returns:
        The stages, in order. They share the model's parameters and buffers, under the same names.

    Raises:
        PlanError: the plan is for another model, or example inputs are needed and missing.
        TraceError: the model cannot be traced.
    """
    graph = plan.graph
    if graph is None:
        if args is None:
            raise PlanError("a plan that was read from JSON needs example inputs: split(model, plan, (x,))")
        graph = trace(model, args, kwargs, leaves=leaves, cut_rules=cut_rules)
    device = next((parameter.device for parameter in model.parameters()), None)
    return list(split_graph(graph, plan, model, device=device))


def split_graph(
    graph: LayerGraph,
    plan: Plan,
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
) -> list[Stage]:
    """Cut a traced model into stages.

    Args:
        graph: the traced model.
        plan: a plan for this graph.
        model: the stages share its parameters and buffers; None leaves them on the meta device.
        device: where tensors that the forward creates are made; None for the device of the trace.

    Returns:
        The stages, in order.

    Raises:
        PlanError: the plan or the model is not of this graph.
    """
    if len(plan.layer_names) != len(graph.layers):
        raise PlanError(
            f"the plan is for {len(plan.layer_names)} layers, this trace of {graph.model_name} has "
            f"{len(graph.layers)}; trace it with the same leaves and cut_rules"
        )
    if plan.fingerprint and plan.fingerprint != graph.fingerprint:
        raise PlanError(
            f"the plan is for another model (fingerprint {plan.fingerprint}, this {graph.model_name} has "
            f"{graph.fingerprint}); make a plan for this one"
        )
    tensors = None if model is None else model_state(model, graph)
    target = None if device is None else torch.device(device)
    return [
        Stage(blueprint, tensors and {name: tensors[name] for name in blueprint.state})
        for blueprint in draw_blueprints(graph, plan.cuts, device=target)
    ]


def model_state(model: nn.Module, graph: LayerGraph) -> dict[str, torch.Tensor]:
    """Every tensor that a traced model needs, by canonical name: parameters, buffers, constants.

    Raises:
        PlanError: `model` is not of the architecture that was traced.
    """
    own = named_tensors(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in graph.state.items():
        tensor = graph.constants[name] if spec.kind == "constant" else own.get(name)
        if tensor is None or tuple(tensor.shape) != spec.shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise PlanError(
                f"{type(model).__name__} is not the model that was traced: {name} of shape {spec.shape} "
                f"is {found}"
            )
        tensors[name] = tensor
    return tensors


def merge(state_dicts: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put the state dicts of all stages of one model together.

    Args:
        state_dicts: one a stage, in order; where several hold a tied tensor, the first one counts.

    Returns:
        A state dict that the whole model's `load_state_dict` accepts.
    """
    merged: dict[str, torch.Tensor] = {}
    for state_dict in state_dicts:
        for name, tensor in state_dict.items():
            merged.setdefault(name, tensor)
    return merged


def run_stages(stages: Sequence[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Run all stages one after another in this process.

    Args:
        stages: in order, as `split` returns them.
        *args, **kwargs: the model's own arguments.

    Returns:
        What the model itself would return.
    """
    result = stages[0](*args, **kwargs)
    for stage in stages[1:]:
        result = stage(*result)
    return result
