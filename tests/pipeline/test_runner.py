"""Pipelined gradients against the whole model in one process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmp.errors import FrameError, PipelineError
from fedmp.pipeline import BatchResult, MicroBatches, StageRunner, links
from fedmp.pipeline.links import Handover, Receiver
from fedmp.schedule import GPipe, Interleaved, OneFOneB, PlacedSchedule, Schedule, VShape, ZeroBubble
from fedmp.stages import split_graph
from fedmp.tasks import CrossEntropy
from tests.pipeline.harness import assert_same_gradients, cut, make_runners, own_stages, traced, train
from tests.support.memory_transport import MemoryHub, MemoryTransport, run_ranks
from tests.support.models import CASES, plan_at

SCHEDULES: list[Schedule] = [GPipe(), OneFOneB(), OneFOneB(warmup="short"), ZeroBubble()]
PLACED: list[PlacedSchedule] = [Interleaved(), VShape(), VShape(splits_backward=False)]


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
        summed += float(loss.detach())
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
        result = train(make_runners(stages), batches, schedule)
        assert result.loss_sum == pytest.approx(reference(whole, batches), rel=1e-12)
        assert_same_gradients(stages, whole)
        buffers = dict(whole.named_buffers())
        for stage in stages:
            for key, mine in stage.named_buffers():
                torch.testing.assert_close(mine, buffers[key], rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("schedule", PLACED, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_gradients_are_exact_where_a_device_runs_several_stages(name: str, schedule: PlacedSchedule) -> None:
    model, graph = traced(name)
    stages = own_stages(model, graph, 4)
    runners = make_runners(stages, placement=schedule.placement(2))
    for step, (batch_size, num_microbatches) in enumerate(((1, 1), (7, 3), (8, 8))):
        whole = copy.deepcopy(model)
        for stage in stages:
            stage.zero_grad()
        batches = cut(CASES[name][1](batch_size, 1), num_microbatches)
        result = train(runners, batches, schedule, step=step)
        assert result.loss_sum == pytest.approx(reference(whole, batches), rel=1e-12)
        assert_same_gradients(stages, whole)
        model.load_state_dict(whole.state_dict())


@pytest.mark.parametrize("name", ["mlp", "gpt", "vit"])
def test_the_gradient_does_not_depend_on_the_number_of_microbatches(name: str) -> None:
    model, graph = traced(name)
    batch = CASES[name][1](7, 1)
    whole = copy.deepcopy(model)
    F.cross_entropy(whole(batch[0]).flatten(0, -2), batch[1].flatten()).backward()
    for num_microbatches in (1, 2, 3, 7, 16):
        stages = own_stages(model, graph, 2)
        train(make_runners(stages), cut(batch, num_microbatches), OneFOneB())
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
        runner = runners[rank]
        return runner.evaluate_batch(batches, round=1, step=0, keep_outputs=outputs.append)

    runners = [StageRunner(s, CrossEntropy(), MemoryTransport(hub, r)) for r, s in enumerate(stages)]
    result = run_ranks(work, 3)[-1]
    expected = model.eval()(inputs)
    torch.testing.assert_close(torch.cat(outputs), expected)
    assert result.weight == 9
    assert result.num_correct == float((expected.argmax(1) == targets).sum())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_holds_a_few_buffers_however_many_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_SMALL_BYTES", 0)
    model, graph = traced("mlp")
    runners = make_runners(own_stages(model, graph, 2))

    def evaluate(num_microbatches: int) -> int:
        batches = cut(CASES["mlp"][1](num_microbatches, 3), num_microbatches)
        run_ranks(lambda rank: runners[rank].evaluate_batch(batches, round=1, step=0), 2)
        return runners[1].buffer_bytes

    assert evaluate(4) == evaluate(40)


def test_buffers_of_an_odd_batch_are_dropped_at_the_next_one() -> None:
    model, graph = traced("mlp")
    runners = make_runners(own_stages(model, graph, 2))
    sizes = []
    for step, batch_size in enumerate((8, 64, 8, 8)):
        train(runners, cut(CASES["mlp"][1](batch_size, 1), 4), GPipe(), step=step)
        sizes.append([runner.buffer_bytes for runner in runners])
    assert sizes[1][1] > sizes[0][1]
    assert sizes[2] == sizes[3] == sizes[0]


def test_activations_in_use_stay_within_the_warm_up_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_SMALL_BYTES", 0)
    model, graph = traced("mlp")
    runners = make_runners(own_stages(model, graph, 3))
    batches = cut(CASES["mlp"][1](16, 1), 16)
    train(runners, batches, OneFOneB(warmup="short"))
    allocated = [
        link.pool.num_allocated for link in runners[2]._wiring.receivers if isinstance(link, Receiver)
    ]
    assert max(allocated) <= 2  # one micro-batch in work, one arriving


def test_small_frames_may_be_more_but_not_much_memory() -> None:
    model, graph = traced("mlp")
    runners = make_runners(own_stages(model, graph, 3))
    train(runners, cut(CASES["mlp"][1](64, 1), 64), OneFOneB(warmup="short"))
    allocated = [
        link.pool.num_allocated for link in runners[2]._wiring.receivers if isinstance(link, Receiver)
    ]
    assert max(allocated) == 64
    ends = [*runners[2]._wiring.receivers, *runners[2]._wiring.senders]
    assert all(end.pool.num_bytes <= 1 << 18 for end in ends if not isinstance(end, Handover))


def test_after_an_error_a_runner_says_so_until_it_is_reconnected() -> None:
    model, graph = traced("mlp")
    stages = own_stages(model, graph, 2)
    runners = make_runners(stages, timeout_s=0.2)
    batches = cut(CASES["mlp"][1](4, 0), 2)
    with pytest.raises(FrameError):
        run_ranks(lambda rank: runners[rank].train_batch(batches, GPipe(), round=1, step=rank), 2)
    with pytest.raises(PipelineError, match="reconnect"):
        runners[1].train_batch(batches, GPipe(), round=1, step=2)
    hub = MemoryHub()
    for rank, runner in enumerate(runners):
        runner.stages[0].zero_grad()
        runner.reconnect(MemoryTransport(hub, rank, generation=1))
    train(runners, batches, GPipe(), step=2)
    reference(model, batches)
    assert_same_gradients(stages, model)
