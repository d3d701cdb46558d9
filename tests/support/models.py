"""The four reference models, small, in float64, with inputs: the cases of many tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fedmp.models import GPT, MLP, ResidualCNN, ViT
from fedmp.records import Plan, StagePlan


def images(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num, 1, 28, 28, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 10, (num,), generator=generator)


def tokens(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 30, (num, 13), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


Batches = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]

CASES: dict[str, tuple[Callable[[], nn.Module], Batches]] = {
    "mlp": (lambda: MLP(hidden=(32, 24, 16)), images),
    "cnn": (lambda: ResidualCNN(widths=(4, 6)), images),
    "gpt": (lambda: GPT(30, 12, width=16, num_layers=2, num_heads=2), tokens),
    "vit": (lambda: ViT(width=16, num_layers=2, num_heads=2), images),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """One of the four models, in float64, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CASES[name][0]().double()


def plan_at(layer_names: tuple[str, ...], cuts: list[int], fingerprint: str = "") -> Plan:
    """A plan with the given cuts and no predictions."""
    bounds = [0, *cuts, len(layer_names)]
    return Plan(
        layer_names=layer_names,
        stages=tuple(
            StagePlan(device=f"d{i}", start=a, stop=b, forward_s=0, backward_s=0)
            for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        ),
        partitioner="given",
        schedule="1f1b",
        num_microbatches=1,
        microbatch_size=1,
        step_s=0.0,
        fingerprint=fingerprint,
    )


def even_cuts(num_layers: int, num_stages: int) -> list[int]:
    """Cuts that make stages of about equally many layers."""
    return [round(index * num_layers / num_stages) for index in range(1, num_stages)]
