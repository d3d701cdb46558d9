"""Transports that match messages by order alone, as nccl does, and buffer nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedmp.schedule import GPipe, Interleaved, OneFOneB, PlacedSchedule, Schedule, VShape, ZeroBubble
from tests.pipeline.harness import assert_same_gradients, cut, make_runners, own_stages, traced
from tests.support.memory_transport import OrderedHub, run_ranks
from tests.support.models import CASES

SCHEDULES: list[Schedule | PlacedSchedule] = [
    GPipe(),
    OneFOneB(),
    OneFOneB(warmup="short"),
    ZeroBubble(),
    Interleaved(),
    VShape(),
    VShape(splits_backward=False),
]


def check(name: str, schedule: Schedule | PlacedSchedule, num_devices: int, num_microbatches: int) -> None:
    """Train with tied gradients and clipping, evaluate with outputs on each device, train again."""
    model, graph = traced(name)
    placement = schedule.placement(num_devices) if isinstance(schedule, PlacedSchedule) else None
    stages = own_stages(model, graph, sum(map(len, placement)) if placement else num_devices)
    # 5 s of silence would be a deadlock; a test must not take longer to say so
    runners = make_runners(stages, placement=placement, hub=OrderedHub(), timeout_s=5.0)
    batch = CASES[name][1](7, 1)
    parts = cut(batch, num_microbatches)
    kept: list[torch.Tensor] = []

    def work(rank: int) -> None:
        runner = runners[rank]
        for step in (0, 1):
            for stage in runner.stages:
                stage.zero_grad()
            runner.train_batch(parts, schedule, round=1, step=step)
            runner.finish_gradients(round=1, step=step, max_norm=0.1)
            for target in range(num_devices):
                keep = kept.append if step == 0 and target == rank == 0 else None
                runner.evaluate_batch(parts, round=1, step=step, keep_outputs=keep, outputs_on=target)

    run_ranks(work, num_devices)
    whole = copy.deepcopy(model)
    whole.train()
    F.cross_entropy(whole(batch[0]).flatten(0, -2), batch[1].flatten()).backward()
    nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
    assert_same_gradients(stages, whole)
    torch.testing.assert_close(torch.cat(kept), model.eval()(batch[0]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("num_devices", [2, 3])
def test_receives_are_posted_in_the_order_of_the_sends(
    schedule: Schedule | PlacedSchedule, num_devices: int
) -> None:
    check("gpt", schedule, num_devices, 4)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from(SCHEDULES),
    st.sampled_from(["gpt", "vit"]),
    st.integers(1, 3),
    st.integers(1, 7),
)
def test_whatever_the_model_and_the_sizes(
    schedule: Schedule | PlacedSchedule, name: str, num_devices: int, num_microbatches: int
) -> None:
    check(name, schedule, num_devices, num_microbatches)
