"""The server optimizer against `torch.optim` on the pseudo-gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fedmp.coordinator import GlobalModel
from fedmp.graph import StateSpec
from tests.support.service import specs, state

OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=0.3),
    "SGD with momentum": partial(torch.optim.SGD, lr=0.3, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.99), eps=1e-3),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1, eps=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
}


def updates(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            name: torch.tensor(3) if name == "b.count" else torch.randn(spec.shape, generator=generator)
            for name, spec in specs().items()
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_server_optimizer_follows_the_pseudo_gradient_as_torch_does(name: str) -> None:
    model = GlobalModel(specs(), state(), OPTIMIZERS[name])
    rival = {key: torch.nn.Parameter(state()[key]) for key in ("a.weight", "b.weight")}
    optimizer = OPTIMIZERS[name](list(rival.values()))
    for update in updates(4):
        model.apply(update)
        for key, parameter in rival.items():
            parameter.grad = -update[key]
        optimizer.step()
    for key, parameter in rival.items():
        assert torch.equal(model.state[key], parameter.detach())


@pytest.mark.parametrize("optimizer", [None, OPTIMIZERS["Adam"]], ids=["averaging", "Adam"])
def test_buffers_take_the_averaged_update_as_it_is(optimizer: Any) -> None:
    model = GlobalModel(specs(), state(), optimizer)
    (update,) = updates(1)
    model.apply(update)
    assert torch.equal(model.state["a.mean"], state()["a.mean"] + update["a.mean"])
    assert model.state["b.count"] == state()["b.count"] + 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_server_optimizer_goes_on_from_its_saved_state(name: str) -> None:
    whole = GlobalModel(specs(), state(), OPTIMIZERS[name])
    first, second = updates(2)
    whole.apply(first)
    tensors, values = whole.optimizer_state()
    copied = {key: tensor.clone() for key, tensor in tensors.items()}
    resumed = GlobalModel(specs(), {k: t.clone() for k, t in whole.state.items()}, OPTIMIZERS[name])
    resumed.load_optimizer_state(copied, dict(values))
    whole.apply(second)
    resumed.apply(second)
    assert all(torch.equal(resumed.state[key], whole.state[key]) for key in whole.state)


def test_tensors_without_an_update_stay_as_they_are() -> None:
    for optimizer in (None, OPTIMIZERS["SGD"]):
        model = GlobalModel(specs(), state(), optimizer)
        model.apply({"a.weight": torch.ones(3, 2)})
        assert not torch.equal(model.state["a.weight"], state()["a.weight"])
        assert all(torch.equal(model.state[key], state()[key]) for key in ("a.mean", "b.weight", "b.count"))


def test_a_model_without_trainable_parameters_needs_no_server_optimizer() -> None:
    frozen = {"w": StateSpec("w", ("w",), (2,), torch.float32, "parameter", True, False)}
    model = GlobalModel(frozen, {"w": torch.ones(2)}, OPTIMIZERS["Adam"])
    model.apply({})
    assert model.optimizer_state() == ({}, {})
    assert torch.equal(model.state["w"], torch.ones(2))
