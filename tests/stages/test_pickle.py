"""A stage that another process receives is the stage that was cut, node by node."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from fedmp.graph import trace
from fedmp.stages import Stage, draw_blueprints
from tests.stages.constructions import CONSTRUCTIONS, construct

# torch 2.13 warns about its own tree specs whenever one is unpickled
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class MakesItsOwnTensors(nn.Module):
    """Positions and noise that depend on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + torch.arange(4, dtype=x.dtype) + torch.rand(4, dtype=x.dtype)
        return self.second(x + torch.randn(()))


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_the_programs_of_every_construction_arrive_unchanged(name: str) -> None:
    args, kwargs = CONSTRUCTIONS[name][1](3)
    graph = trace(construct(name), args, kwargs)
    blueprints = draw_blueprints(graph, [1])
    for sent, arrived in zip(blueprints, pickle.loads(pickle.dumps(blueprints)), strict=True):
        for training in (True, False):
            first, second = sent.program(training=training), arrived.program(training=training)
            assert str(second.module.graph) == str(first.module.graph)
            assert second.module.code == first.module.code
            assert [node.name for node in second.module.graph.nodes] == [
                node.name for node in first.module.graph.nodes
            ]


def test_a_random_tensor_is_drawn_anew_in_the_process_that_receives_the_stage() -> None:
    model = MakesItsOwnTensors()
    blueprint = draw_blueprints(trace(model, (torch.zeros(2, 4),)), [])[0]
    stage = Stage(pickle.loads(pickle.dumps(blueprint)), dict(model.state_dict()))
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = model(torch.ones(2, 4))
        torch.manual_seed(seed)
        found = stage(torch.ones(2, 4))
        assert torch.equal(found, expected)
