"""Pipelined gradients against the whole model in one process."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmp.errors import FrameError
from fedmp.graph import LayerGraph, trace
from fedmp.pipeline import BatchResult, MicroBatches, StageRunner, microbatch_sizes
from fedmp.schedule import GPipe, OneFOneB, Schedule
from fedmp.stages import Stage, model_state, split_graph
from fedmp.tasks import CrossEntropy
from tests.support.memory_transport import MemoryHub, MemoryTransport, run_ranks
from tests.support.models import CASES, build, even_cuts, plan_at

SCHEDULES: list[Schedule] = [GPipe(), OneFOneB(), OneFOneB(warmup="short")]


def traced(name: str) -> tuple[nn.Module, LayerGraph]:
    model = build(name)
    inputs, _ = CASES[name][1](4, 0)
    return model, trace(model, (inputs,))


def own_stages(model: nn.Module, graph: LayerGraph, num_stages: int) -> list[Stage]:
    """Stages with weights of their own, as separate processes would have."""
    names = tuple(layer.name for layer in graph.layers)
    stages = split_graph(graph, plan_at(names, even_cuts(len(names), num_stages)))
    state = model_state(model, graph)
    for stage in stages:
        stage.materialize("cpu").load_state({name: state[name] for name in stage.blueprint.state})
    return stages


def assert_same_gradients(stages: Sequence[Stage], whole: nn.Module) -> None:
    """Every stage, sharers of a tied parameter included, has the whole model's gradient."""
    expected = dict(whole.named_parameters())
    for stage in stages:
        for key, mine in stage.named_parameters():
            torch.testing.assert_close(mine.grad, expected[key].grad, rtol=1e-10, atol=1e-13, msg=key)


def cut(batch: tuple[torch.Tensor, torch.Tensor], num_microbatches: int) -> MicroBatches:
    sizes = microbatch_sizes(len(batch[0]), num_microbatches)
    inputs = [(part,) for part in batch[0].split(sizes)]
    return MicroBatches(sizes, inputs, batch[1].split(sizes))


def train(
    stages: Sequence[Stage], batches: MicroBatches, schedule: Schedule, steps: int = 1
) -> list[BatchResult]:
    hub = MemoryHub()

    def work(rank: int) -> BatchResult:
        runner = StageRunner(stages[rank], CrossEntropy(), MemoryTransport(hub, rank))
        return [runner.train_batch(batches, schedule, round=1, step=s) for s in range(steps)][-1]

    return run_ranks(work, len(stages))


def reference(model: nn.Module, batches: MicroBatches) -> float:
    """Full-batch loss and gradients, micro-batch by micro-batch for the sake of batch norm alone."""
    assert batches.inputs is not None
    assert batches.targets is not None
    total = sum(targets.numel() for targets in batches.targets)
    summed = 0.0
    model.train()
    for (inputs,), targets in zip(batches.inputs, batches.targets, strict=True):
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="sum")
        (loss / total).backward()
        summed += float(loss)
    return summed


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_pipelined_gradients_equal_those_of_one_process(
    name: str, num_stages: int, schedule: Schedule
) -> None:
    model, graph = traced(name)
    for batch_size, num_microbatches in ((1, 1), (7, 3), (8, 8), (3, 5)):
        batches = cut(CASES[name][1](batch_size, 1), num_microbatches)
        whole = copy.deepcopy(model)
        stages = own_stages(model, graph, num_stages)
        result = train(stages, batches, schedule)[-1]
        assert result.loss_sum == pytest.approx(reference(whole, batches), rel=1e-12)
        assert_same_gradients(stages, whole)
        buffers = dict(whole.named_buffers())
        for stage in stages:
            for key, mine in stage.named_buffers():
                torch.testing.assert_close(mine, buffers[key], rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["mlp", "gpt", "vit"])
def test_the_gradient_does_not_depend_on_the_number_of_microbatches(name: str) -> None:
    model, graph = traced(name)
    batch = CASES[name][1](7, 1)
    whole = copy.deepcopy(model)
    F.cross_entropy(whole(batch[0]).flatten(0, -2), batch[1].flatten()).backward()
    for num_microbatches in (1, 2, 3, 7, 16):
        stages = own_stages(model, graph, 2)
        train(stages, cut(batch, num_microbatches), OneFOneB())
        assert_same_gradients(stages, whole)


def test_a_frame_of_another_step_is_refused_by_name() -> None:
    model, graph = traced("mlp")
    stages = split_graph(graph, plan_at(tuple(layer.name for layer in graph.layers), [1]), model)
    batches = cut(CASES["mlp"][1](4, 0), 1)
    hub = MemoryHub()

    def work(rank: int) -> None:
        runner = StageRunner(stages[rank], CrossEntropy(), MemoryTransport(hub, rank, timeout_s=0.5))
        runner.train_batch(batches, GPipe(), round=1, step=rank)

    with pytest.raises(FrameError, match="step 0 instead of 1"):
        run_ranks(work, 2)


def test_evaluation_returns_every_output_and_leaves_no_gradient() -> None:
    model, graph = traced("cnn")
    stages = split_graph(graph, plan_at(tuple(layer.name for layer in graph.layers), [3, 6]), model)
    inputs, targets = CASES["cnn"][1](9, 3)
    batches = cut((inputs, targets), 4)
    hub = MemoryHub()
    outputs: list[torch.Tensor] = []

    def work(rank: int) -> BatchResult:
        runner = StageRunner(stages[rank], CrossEntropy(), MemoryTransport(hub, rank))
        return runner.evaluate_batch(batches, round=1, step=0, keep_outputs=outputs.append)

    result = run_ranks(work, 3)[-1]
    expected = model.eval()(inputs)
    torch.testing.assert_close(torch.cat(outputs), expected)
    assert result.weight == 9
    assert result.num_correct == float((expected.argmax(1) == targets).sum())
    assert all(parameter.grad is None for parameter in model.parameters())
