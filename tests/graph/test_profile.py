"""Costs: counted bytes and operations, measured times, models larger than this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedmp.graph import measure_flops_per_s, profile, trace
from fedmp.models import GPT
from fedmp.stages import run_stages, split_graph
from tests.support.models import CASES, build, even_cuts, plan_at


def test_bytes_and_operations_of_linear_layers_are_exact() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 256))
    costs = profile(trace(model, (torch.zeros(512, 64),)))
    first, second = costs.layers
    # each saves its input, and the loss after the last one its own
    assert (first.activation_bytes, second.activation_bytes) == (64 * 4, (128 + 256) * 4)
    # gradients of input and result; the model's input has none
    assert (first.workspace_bytes, second.workspace_bytes) == (128 * 4, (128 + 256) * 4)
    assert (first.boundary_bytes, first.gradient_bytes, first.reused_bytes) == (128 * 4, 128 * 4, 128 * 4)
    assert second.forward_s * costs.reference_flops_per_s == pytest.approx(2 * 128 * 256, rel=0.5)
    assert costs.parameter_bytes["1.weight"] == 128 * 256 * 4


class Skip(nn.Module):
    """Two layers that an addition passes by, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Conv1d(1, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.third(torch.sin(self.second(x)))
        return self.head(x.unsqueeze(1))


def test_gradients_that_wait_for_others_are_part_of_the_workspace() -> None:
    first, second, third, head = profile(trace(Skip(), (torch.zeros(4, 8),))).layers
    row = 8 * 4
    # of what the layer takes and gives, and of what passes it by
    assert (first.workspace_bytes, second.workspace_bytes, third.workspace_bytes) == (row, 3 * row, 3 * row)
    # of the input and four channels, and a convolution's copies
    assert head.workspace_bytes == (1 + 4) * row + 2 * 4 * row
    # the second keeps its input, which it is handed, and the sine's argument; the sine is the third's to keep
    assert (first.reused_bytes, second.activation_bytes) == (row, 2 * row)
    assert (second.reused_bytes, third.activation_bytes) == (row, row)


@pytest.mark.parametrize("name", CASES)
def test_measured_times_cover_every_layer_and_leave_the_model_alone(name: str) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = trace(model, (CASES[name][1](3, 0)[0],))
    costs = profile(graph, method="measured", model=model, microbatch_size=2)
    assert costs.method == "measured"
    assert all(layer.forward_s > 0 for layer in costs.layers)
    assert sum(layer.backward_s for layer in costs.layers) > 0
    estimated = profile(graph)
    assert [layer.activation_bytes for layer in costs.layers] == [
        x.activation_bytes for x in estimated.layers
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_speed_of_this_machine_is_a_speed() -> None:
    assert 1e8 < measure_flops_per_s(size=128) < 1e15


def test_measuring_without_weights_is_refused() -> None:
    graph = trace(nn.Sequential(nn.Linear(4, 4)), (torch.zeros(2, 4),))
    with pytest.raises(ValueError, match="needs the model"):
        profile(graph, method="measured")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="on the meta device"):
        profile(trace(empty, (torch.zeros(2, 4),)), method="measured", model=empty)
    with pytest.raises(ValueError, match="'flops' or 'measured'"):
        profile(graph, method="guess")  # type: ignore[arg-type]


def test_a_model_without_memory_costs_what_the_real_one_does() -> None:
    with torch.device("meta"):
        empty = GPT(30, 12, width=16, num_layers=2, num_heads=2).double()
    inputs = (CASES["gpt"][1](3, 0)[0],)
    assert profile(trace(empty, inputs)).layers == profile(trace(build("gpt"), inputs)).layers


@pytest.mark.slow
def test_a_decoder_of_7_billion_parameters_is_planned_in_seconds_without_its_memory() -> None:
    root = Path(__file__).parents[2]
    code = "import benchmarks.planning as p; r = p.plan_7b(); print(r.parameters, r.cpu_s, r.peak_bytes)"
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=root, capture_output=True, text=True
    )
    parameters, cpu_s, peak_bytes = map(float, out.stdout.split())
    assert parameters > 6.9e9
    assert peak_bytes < 2e9
    assert cpu_s < 20  # 7 on an idle machine; a busy one takes longer even by the processor's clock


class MakesTensors(nn.Module):
    """Creates positions and masks on its input's device, some of them in blocks of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x) + torch.arange(6, device=x.device)
        with torch.no_grad():
            shift = torch.linspace(0, 1, 6, device=x.device).to(x.dtype)
        with torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False):
            shift = shift * torch.ones(6, device=x.device, dtype=x.dtype)
        x = self.layers[1](x + shift)
        return self.layers[2](x).masked_fill(torch.ones(6, 6, device=x.device).triu(1).bool()[0], 0.0)


def test_a_model_traced_without_memory_runs_where_its_stages_get_weights() -> None:
    with torch.device("meta"):
        graph = trace(MakesTensors(), (torch.zeros(3, 6),))
    assert profile(graph).layers
    model = MakesTensors()
    names = tuple(layer.name for layer in graph.layers)
    stages = split_graph(graph, plan_at(names, even_cuts(len(names), 3)), device="cpu")
    assert all(parameter.is_meta for stage in stages for parameter in stage.parameters())
    for stage in stages:
        stage.materialize("cpu").load_state(
            {name: model.state_dict()[name] for name in stage.blueprint.state}
        )
    x = torch.randn(5, 6)
    assert torch.equal(run_stages(stages, x), model(x))
