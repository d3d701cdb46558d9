"""Whether it matters how a batch is cut, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedmp.cohort import cutting_matters
from fedmp.tasks import CrossEntropy

MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "plain": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), False),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), False),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), True),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 3)), True),
}


@pytest.mark.parametrize("name", MODELS)
def test_cutting_a_batch_matters_where_samples_mix_or_noise_is_drawn(name: str) -> None:
    make, expected = MODELS[name]
    torch.manual_seed(0)
    model, inputs, targets = make(), torch.randn(7, 6), torch.tensor([0, 1, 2, 0, 1, -100, 2])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert cutting_matters(model, CrossEntropy(), inputs, targets) is expected
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_of_a_batch_of_three_it_is_not_known() -> None:
    assert cutting_matters(nn.Linear(6, 3), CrossEntropy(), torch.randn(3, 6), torch.tensor([0, 1, 2]))
