"""Partition a model in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel
from torch import nn

from fedmp.errors import ConfigError
from fedmp.graph import CutRules, LayerGraph, profile, trace
from fedmp.partition.balanced import Balanced
from fedmp.partition.exact import Exact
from fedmp.partition.partitioner import Partitioner
from fedmp.partition.uniform import Uniform
from fedmp.records import Plan, Profile
from fedmp.topology import Device, Link, Links

__all__ = ["Costs", "partition", "plan_graph", "plan_profile"]

Costs: TypeAlias = Literal["flops", "measured"]

_BY_NAME: dict[str, type[Uniform] | type[Balanced] | type[Exact]] = {
    "uniform": Uniform,
    "balanced": Balanced,
    "exact": Exact,
}


def partition(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    devices: Sequence[Device],
    links: Links | Link | None = None,
    partitioner: str | Partitioner = "balanced",
    num_microbatches: int = 8,
    schedule: str | None = None,
    batch_size: int | None = None,
    optimizer_copies: float = 1.0,
    costs: Costs = "flops",
    leaves: Sequence[str] = (),
    cut_rules: CutRules | None = None,
) -> Plan:
    """Cut a model over a client's devices.

    Args:
        model: any module that `torch.export` can trace; it may live on the meta device.
        args, kwargs: example inputs of `model.forward`; the first dim of tensors is the batch.
        devices: the client's devices.
        links: between the devices: one link for all, or a `Links`; None for 1 Gbit/s.
        partitioner: "uniform" (every device, equally many layers), "balanced" (devices in the order
            given), "exact" (also chooses the devices and their order), or an object of your own.
        num_microbatches: into which a batch is cut.
        schedule: "gpipe", "1f1b", "1f1b-short", "zero-bubble", "interleaved" or "v-shape"; None
            for the partitioner's own choice.
        batch_size: samples in one optimizer step; None for that of the example inputs.
        optimizer_copies: optimizer state in units of the parameters' size (SGD 0, with momentum 1, Adam 2).
        costs: "flops" estimates the layers' times, for models of any size; "measured" runs each layer here,
            at the size of a micro-batch.
        leaves: path patterns of modules that are not traced into, for what `torch.export` cannot trace.
        cut_rules: where to cut and where not, and which device runs what; None for anywhere.

    Returns:
        The plan; `fedmp.split(model, plan)` makes the stages.

    Raises:
        TraceError: the forward cannot be traced.
        PlanError: the model cannot be cut as asked; InfeasibleError: it does not fit the memory.
        ConfigError: no partitioner has that name.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> plan = partition(model, (torch.zeros(16, 8),), devices=[Device("a"), Device("b")],
        ...                  partitioner="uniform", num_microbatches=4)
        >>> [stage.device for stage in plan.stages]
        ['a', 'b']
    """
    return plan_graph(
        trace(model, args, kwargs, leaves=leaves, cut_rules=cut_rules),
        devices=devices,
        links=links,
        partitioner=partitioner,
        num_microbatches=num_microbatches,
        schedule=schedule,
        batch_size=batch_size,
        optimizer_copies=optimizer_copies,
        costs=costs,
        model=model,
    )


def plan_graph(
    graph: LayerGraph,
    *,
    devices: Sequence[Device],
    links: Links | Link | None = None,
    partitioner: str | Partitioner = "balanced",
    num_microbatches: int = 8,
    schedule: str | None = None,
    batch_size: int | None = None,
    optimizer_copies: float = 1.0,
    costs: Costs = "flops",
    model: nn.Module | None = None,
) -> Plan:
    """Cut a model that is traced already; see `partition`. Measured costs need the model itself."""
    profiled = profile(
        graph,
        batch_size=batch_size,
        optimizer_copies=optimizer_copies,
        method=costs,
        model=model,
        microbatch_size=math.ceil((batch_size or graph.batch_size) / num_microbatches),
    )
    plan = plan_profile(
        profiled,
        devices=devices,
        links=links,
        partitioner=partitioner,
        num_microbatches=num_microbatches,
        schedule=schedule,
    )
    return plan.model_copy(update={"fingerprint": graph.fingerprint}).with_graph(graph)


def plan_profile(
    profiled: Profile,
    *,
    devices: Sequence[Device],
    links: Links | Link | None = None,
    partitioner: str | Partitioner = "balanced",
    num_microbatches: int = 8,
    schedule: str | None = None,
) -> Plan:
    """Cut a model of which only the costs are known; see `partition`.

    Raises:
        ConfigError: no partitioner has that name.
        PlanError: the model cannot be cut as asked; InfeasibleError: it does not fit the memory.
    """
    if isinstance(partitioner, str):
        if partitioner not in _BY_NAME:
            raise ConfigError(f"no partitioner is called {partitioner!r}; there are {', '.join(_BY_NAME)}")
        partitioner = _BY_NAME[partitioner]()
    if (
        schedule is not None
        and isinstance(partitioner, BaseModel)
        and "schedule" in type(partitioner).model_fields
    ):
        partitioner = partitioner.model_copy(update={"schedule": schedule})
    if links is None or isinstance(links, Link):
        links = Links(default=links or Link())
    return partitioner.plan(profiled, devices, links, num_microbatches=num_microbatches)
