"""Flat optimizers against torch's own, entry by entry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedmp.cohort import flat_optimizer

FACTORIES: dict[str, Callable[..., Any]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "amsgrad": functools.partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.9), amsgrad=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "a function": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.3),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("per_client", [False, True])
def test_a_flat_optimizer_moves_as_torchs_does(name: str, per_client: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    alone = [torch.nn.Parameter(row.clone()) for row in start]
    theirs = [FACTORIES[name]([parameter]) for parameter in alone]
    ours = flat_optimizer(FACTORIES[name])
    assert ours is not None
    rows = start.clone()
    state = [torch.full_like(rows, float("nan")) for _ in range(ours.num_buffers)]
    for step in range(4):
        gradients = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        rates = [ours.lr * (1 - 0.1 * step), ours.lr * (1 - 0.2 * step * per_client - 0.1 * step)]
        if not per_client:
            rates[1] = rates[0]
        for parameter, optimizer, gradient, rate in zip(alone, theirs, gradients, rates, strict=True):
            parameter.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        lr = torch.tensor(rates, dtype=torch.float64).unsqueeze(1) if per_client else rates[0]
        ours.step(rows, gradients, state, step, lr)
    torch.testing.assert_close(rows, torch.stack([p.detach() for p in alone]), rtol=1e-13, atol=1e-15)


def test_an_optimizer_that_is_not_known_has_no_flat_one() -> None:
    assert flat_optimizer(functools.partial(torch.optim.RMSprop, lr=0.1)) is None
