"""Ways out of what cannot be traced: leaves and chains."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmp.errors import TraceError
from fedmp.graph import Chain, profile, trace
from fedmp.stages import draw_blueprints
from tests.stages.oracle import check_split

WIDTH = 6


class Untraceable(nn.Module):
    """Branches on values, uses NumPy and a buffer, drops out, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.4))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor, *, factor: float) -> dict[str, Any]:
        self.calls += 1
        x = self.inner(x) * self.scale * factor
        if x.detach().sum().item() > 0:
            x = x.tanh()
        order = torch.from_numpy(np.argsort(x.detach().numpy(), axis=-1))
        return {"x": x, "order": order, "rows": x.shape[0]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.odd = Untraceable()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        found = self.odd(x, factor=2.0)
        x = found["x"] + x.gather(-1, found["order"]) / found["rows"]
        for block in self.blocks:
            x = x + block(x).relu()
        return self.last(x)


def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64),), {}


def build(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model.double()


def test_an_error_names_the_module_the_line_and_the_ways_out() -> None:
    with pytest.raises(TraceError) as caught:
        trace(build(Model()), *inputs(3))
    message = str(caught.value)
    for part in (
        "'odd' (Untraceable)",
        "x.detach().sum().item() > 0",
        "test_leaves.py",
        "leaves=('odd',)",
        "Chain",
    ):
        assert part in message


def test_a_leaf_runs_the_original_module_in_its_stage() -> None:
    model = build(Model())
    graph = trace(model, *inputs(3), leaves=("odd",))
    assert "odd" in [layer.name for layer in graph.layers]
    check_split(model, inputs, batches=(2, 3, 5), graph=graph, tolerance=1e-14)
    assert int(model.odd.calls) == 0, "tracing must not run the original"


def test_a_leaf_can_be_profiled_and_handed_to_another_process() -> None:
    graph = trace(build(Model()), *inputs(3), leaves=("odd",))
    costs = profile(graph)
    odd = next(layer for layer in costs.layers if layer.name == "odd")
    assert odd.forward_s > 0
    assert odd.activation_bytes > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13's own, on unpickling a tree's spec
        blueprints = pickle.loads(pickle.dumps(draw_blueprints(graph, [2])))
    assert [blueprint.index for blueprint in blueprints] == [0, 1]


def test_a_chain_works_though_nothing_in_it_can_be_traced() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Untraceable()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, factor=0.5)["x"]

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x * float(x.detach().max())

    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    model = build(Chain(Plain(), Pair(), Sum(), Plain(), nn.Linear(WIDTH, 2)))
    report = check_split(model, inputs, batches=(2, 3, 5), num_stages=(2, 3), tolerance=1e-14)
    assert report.num_layers == 3


def test_a_pattern_that_matches_nothing_says_which_modules_there_are() -> None:
    with pytest.raises(TraceError, match=r"no module of Model matches the leaf 'od'.*'first', 'odd'"):
        trace(build(Model()), *inputs(3), leaves=("od",))


def test_a_leaf_that_fails_on_example_inputs_says_so() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("no such thing")

    with pytest.raises(
        TraceError, match=r"leaf '1' \(Fails\) fails on example inputs of shapes.*no such thing"
    ):
        trace(nn.Sequential(nn.Linear(WIDTH, WIDTH), Fails()).double(), *inputs(3), leaves=("1",))


def test_an_autograd_function_that_takes_a_module_is_refused() -> None:
    class Apply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, module: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
            return None, gradient

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Apply.apply(self.inner, x)

    with pytest.raises(TraceError, match="autograd function Apply takes a function or a module"):
        trace(Uses().double(), *inputs(3))
