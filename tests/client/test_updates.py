"""Updates as differences: what is in them, and that they take a state where it went."""

from __future__ import annotations

import pytest
import torch

from fedmp.graph import StateSpec
from fedmp.updates import apply_update, difference, trained_names


def spec(name: str, kind: str = "parameter", *, requires_grad: bool = True) -> StateSpec:
    return StateSpec(name, (name,), (2,), torch.float32, kind, True, requires_grad)  # type: ignore[arg-type]


SPECS = [
    spec("w"),
    spec("frozen", requires_grad=False),
    spec("mean", "buffer", requires_grad=False),
    spec("mask", "constant", requires_grad=False),
]


def test_trainable_parameters_and_buffers_travel() -> None:
    assert trained_names(SPECS) == ("w", "mean")


def test_buffers_can_stay_at_home() -> None:
    assert trained_names(SPECS, with_buffers=False) == ("w",)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.tensor([1.0, -2.0]), torch.tensor([0.5, 7.0])),
        (torch.tensor([3, 4]), torch.tensor([9, 1])),
        (torch.tensor([True, False]), torch.tensor([False, False])),
    ],
    ids=["floats", "counters", "flags"],
)
def test_a_difference_applied_gives_the_state_that_it_came_from(
    before: torch.Tensor, after: torch.Tensor
) -> None:
    update = difference({"x": after}, {"x": before, "more": before})
    assert update.keys() == {"x"}
    assert update["x"].dtype == before.dtype
    assert torch.equal(apply_update({"x": before}, update)["x"], after)


def test_a_state_without_an_update_is_handed_on() -> None:
    state = {"x": torch.ones(1), "y": torch.zeros(1)}
    applied = apply_update(state, {"x": torch.ones(1)})
    assert applied["x"] == 2
    assert applied["y"] is state["y"]
    assert state["x"] == 1, "the state that was given is not changed"
