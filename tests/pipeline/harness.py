"""Stages with weights of their own on threads of one process, against the whole model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from fedmp.graph import LayerGraph, trace
from fedmp.pipeline import (
    BatchResult,
    DeviceRunner,
    MicroBatches,
    RunnerOptions,
    StageRunner,
    Transport,
    microbatch_sizes,
)
from fedmp.schedule import PlacedSchedule, Schedule
from fedmp.stages import Stage, model_state, split_graph
from fedmp.tasks import CrossEntropy, Task
from tests.support.memory_transport import MemoryHub, MemoryTransport, OrderedHub, OrderedTransport, run_ranks
from tests.support.models import CASES, build, even_cuts, plan_at

PLAIN = RunnerOptions()
torch.set_num_threads(1)


@cache
def _traced(name: str) -> tuple[nn.Module, LayerGraph]:
    model = build(name)
    inputs, _ = CASES[name][1](4, 0)
    return model, trace(model, (inputs,))


def traced(name: str) -> tuple[nn.Module, LayerGraph]:
    """A model of the test's own, and its trace, which is made once."""
    model, graph = _traced(name)
    return copy.deepcopy(model), graph


def own_stages(model: nn.Module, graph: LayerGraph, cuts: int | Sequence[int]) -> list[Stage]:
    """Stages with weights of their own, as separate processes would have; `cuts` or how many stages."""
    names = tuple(layer.name for layer in graph.layers)
    at = even_cuts(len(names), cuts) if isinstance(cuts, int) else list(cuts)
    stages = split_graph(graph, plan_at(names, at))
    state = model_state(model, graph)
    for stage in stages:
        stage.materialize("cpu").load_state({name: state[name] for name in stage.blueprint.state})
    return stages


def cut(batch: tuple[torch.Tensor, torch.Tensor], num_microbatches: int) -> MicroBatches:
    """A batch in micro-batches."""
    sizes = microbatch_sizes(len(batch[0]), num_microbatches)
    inputs = [(part,) for part in batch[0].split(sizes)]
    return MicroBatches(sizes, inputs, batch[1].split(sizes))


def make_runners(
    stages: Sequence[Stage],
    *,
    task: Task | None = None,
    placement: Sequence[Sequence[int]] | None = None,
    options: RunnerOptions = PLAIN,
    seed: int | None = None,
    hub: MemoryHub | OrderedHub | None = None,
    timeout_s: float = 20.0,
) -> list[DeviceRunner]:
    """A runner for each device, joined by one hub."""
    hub, task = hub or MemoryHub(), task or CrossEntropy()

    def transport(rank: int) -> Transport:
        if isinstance(hub, OrderedHub):
            return OrderedTransport(hub, rank, timeout_s=timeout_s)
        return MemoryTransport(hub, rank, timeout_s=timeout_s)

    if placement is None:
        return [
            StageRunner(
                stage,
                task,
                transport(rank),
                options=options,
                seed=seed,
            )
            for rank, stage in enumerate(stages)
        ]
    return [
        DeviceRunner(
            [stages[index] for index in own],
            task,
            transport(device),
            device=device,
            placement=placement,
            options=options,
            seed=seed,
        )
        for device, own in enumerate(placement)
    ]


def train(
    runners: Sequence[DeviceRunner],
    batches: MicroBatches,
    schedule: Schedule | PlacedSchedule,
    *,
    step: int = 0,
    max_norm: float | None = None,
) -> BatchResult:
    """One batch on all devices, gradients finished; the result of whichever device has the last stage."""

    def work(rank: int) -> BatchResult:
        result = runners[rank].train_batch(batches, schedule, round=1, step=step)
        runners[rank].finish_gradients(round=1, step=step, max_norm=max_norm)
        return result

    total = BatchResult()
    for result in run_ranks(work, len(runners)):
        total = total + result
    return total


def assert_same_gradients(
    stages: Sequence[Stage], whole: nn.Module, *, rtol: float = 1e-10, atol: float = 1e-13
) -> None:
    """Every stage, sharers of a tied parameter included, has the whole model's gradient.

    Sums over micro-batches are added in another order, which costs a few float64 roundings.
    """
    expected = dict(whole.named_parameters())
    for stage in stages:
        for key, mine in stage.named_parameters():
            other = expected[key].grad
            if mine.grad is None or other is None:
                assert not _some(mine.grad), f"{key} has a gradient"
                assert not _some(other), f"{key} has no gradient"
                continue
            torch.testing.assert_close(mine.grad, other, rtol=rtol, atol=atol, msg=key)


def _some(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
