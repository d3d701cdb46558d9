"""Random models, cuts, schedules and sizes against one process and the full batch at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedmp.graph import trace
from fedmp.schedule import GPipe, Interleaved, OneFOneB, Schedule, VShape, ZeroBubble
from tests.pipeline.harness import assert_same_gradients, cut, make_runners, own_stages, train

SCHEDULES: list[Schedule] = [GPipe(), OneFOneB(), OneFOneB(warmup="short"), ZeroBubble()]
FEATURES, TOKENS, CLASSES = 6, 4, 5


class RandomModel(nn.Module):
    """Layers of many kinds in random order, with skips of random length, tied and frozen weights."""

    def __init__(self, kinds: list[str], skips: list[int], frozen: set[int]) -> None:
        super().__init__()
        self.embed = nn.Linear(3, FEATURES)
        self.kinds, self.skips = kinds, skips
        tied = nn.Linear(FEATURES, FEATURES)
        make = {
            "linear": lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()),
            "tied": lambda: tied,
            "norm": lambda: nn.LayerNorm(FEATURES),
            "conv": lambda: nn.Conv1d(TOKENS, TOKENS, 3, padding=1),
            "relu": lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(inplace=True)),
        }
        self.blocks = nn.ModuleList(make[kind]() for kind in kinds)
        self.head = nn.Linear(FEATURES, CLASSES)
        for index in frozen:
            for parameter in self.blocks[index % len(kinds)].parameters():
                parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [self.embed(x)]
        for block, skip in zip(self.blocks, self.skips, strict=True):
            values.append(block(values[-1]) + values[max(0, len(values) - 1 - skip)])
        return self.head(values[-1])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_random_models_and_schedules_give_the_full_batch_gradient(data: st.DataObject) -> None:
    check_random_case(data)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_many_random_models_and_schedules_give_the_full_batch_gradient(data: st.DataObject) -> None:
    check_random_case(data)


def check_random_case(data: st.DataObject) -> None:
    """Draw a model and several ways to run it; all must give the gradient of one process."""
    kinds = data.draw(
        st.lists(st.sampled_from(["linear", "tied", "norm", "conv", "relu"]), min_size=2, max_size=6)
    )
    skips = data.draw(st.lists(st.integers(0, 5), min_size=len(kinds), max_size=len(kinds)))
    frozen = data.draw(st.sets(st.integers(0, 5), max_size=2))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    torch.manual_seed(0)
    model = RandomModel(kinds, skips, frozen).to(dtype)
    graph = trace(model, (torch.zeros(4, TOKENS, 3, dtype=dtype),))
    for _ in range(4):
        batch_size = data.draw(st.integers(1, 67))
        num_microbatches = data.draw(st.integers(1, 16))
        generator = torch.Generator().manual_seed(batch_size)
        inputs = torch.randn(batch_size, TOKENS, 3, generator=generator, dtype=dtype)
        targets = torch.randint(0, CLASSES, (batch_size, TOKENS), generator=generator)
        masked = torch.rand(targets.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.5]))
        masked.view(-1)[0] = False  # a batch of which nothing counts has no mean
        targets[masked] = -100
        model.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()

        placed = data.draw(st.sampled_from([None, Interleaved(), VShape(), VShape(splits_backward=False)]))
        most = len(graph.layers)
        if placed is None or most < 4:
            num_stages = data.draw(st.integers(1, min(5, most)))
            schedule, placement = data.draw(st.sampled_from(SCHEDULES)), None
        else:
            num_stages, schedule, placement = 4, placed, placed.placement(2)
        cuts = data.draw(
            st.lists(st.integers(1, most - 1), min_size=num_stages - 1, max_size=num_stages - 1, unique=True)
        )
        stages = own_stages(model, graph, sorted(cuts))
        train(make_runners(stages, placement=placement), cut((inputs, targets), num_microbatches), schedule)
        if dtype is torch.float64:
            # up to 16 sums in another order; gradients near 1e-2
            assert_same_gradients(stages, model, rtol=1e-11, atol=1e-14)
        else:
            assert_same_gradients(stages, model, rtol=1e-4, atol=1e-6)
