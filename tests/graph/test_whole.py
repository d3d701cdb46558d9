"""What a model costs in one stage is the same whether it was traced or run once, and what a hand count says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmp.graph import profile, profile_whole, trace
from fedmp.graph.profile import REFERENCE_FLOPS_PER_S
from fedmp.models import CNN, GPT
from tests.support.jobs import TINY_GPT, TINY_MLP

IMAGES, TOKENS = torch.zeros(7, 1, 28, 28), torch.zeros(7, 12, dtype=torch.int64)


class Attention(nn.Module):
    """An attention by itself, by way of a tuple and of a dropout that drops nothing: neither costs anything."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = x.unbind(1)
        return F.dropout(F.scaled_dot_product_attention(query, key, value, is_causal=True), 0.0)


@pytest.mark.parametrize(
    ("model", "inputs", "tolerance"),
    [
        (TINY_MLP, IMAGES, 1e-6),
        (CNN, IMAGES, 1e-6),
        # a traced layer norm is not charged for the means and deviations that its kernel writes
        (TINY_GPT, TOKENS, 2e-2),  # eight wide
        (GPT, TOKENS, 5e-3),
    ],
)
def test_a_single_stage_costs_what_its_trace_says(model: Any, inputs: torch.Tensor, tolerance: float) -> None:
    made = model()
    traced, whole = profile(trace(made, (inputs,))), profile_whole(made, inputs)
    for field in ("forward_s", "backward_s", "activation_bytes"):
        expected = sum(getattr(layer, field) for layer in traced.layers)
        assert getattr(whole.layers[0], field) == pytest.approx(expected, rel=tolerance), field
    assert whole.parameter_bytes == traced.parameter_bytes
    assert whole.update_s_per_byte == traced.update_s_per_byte


def test_an_attention_costs_its_two_products_of_matrices() -> None:
    num_heads, length, width = 4, 96, 8
    inputs = torch.zeros(5, 3, num_heads, length, width)
    by_hand = (
        num_heads * 2 * (length * width * length) * 2
    )  # of one sample: queries by keys, weights by values
    model = Attention()
    traced, whole = profile(trace(model, (inputs,))), profile_whole(model, inputs)
    for layers in (traced.layers, whole.layers):
        assert sum(layer.forward_s for layer in layers) * REFERENCE_FLOPS_PER_S == pytest.approx(by_hand)
