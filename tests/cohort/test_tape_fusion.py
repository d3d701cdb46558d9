"""A convolution and its ReLU are one operation of a tape where that gives the same numbers, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from fedmp.cohort.recording import record
from fedmp.cohort.tape import Tape
from fedmp.cohort.tape_fusion import fused

LAST = torch.channels_last
WEIGHT, BIAS = torch.randn(12, 4, 3, 3).contiguous(memory_format=LAST), torch.randn(12)
Forward = Callable[[torch.Tensor], torch.Tensor]


def convolved(x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, WEIGHT.to(x.dtype), BIAS.to(x.dtype), padding=1, groups=3)


def both(x: torch.Tensor) -> torch.Tensor:
    out = convolved(x)
    return out.relu() + out


def regrouped(x: torch.Tensor) -> torch.Tensor:
    return convolved(x).unflatten(1, (3, -1)).transpose(0, 1).relu()


FORWARDS: dict[str, tuple[Forward, bool]] = {
    "plain": (lambda x: convolved(x).relu(), True),
    "of each client": (regrouped, True),
    "without a bias": (lambda x: F.conv2d(x, WEIGHT, groups=3).relu(), True),
    "read twice": (both, False),
    "half of it": (lambda x: convolved(x)[:1].relu(), False),
    "another function": (lambda x: convolved(x).sigmoid(), False),
    "other numbers": (lambda x: convolved(x.double()).relu(), False),
    "channels first": (lambda x: convolved(x.contiguous()).relu(), False),
}


@pytest.mark.parametrize("name", FORWARDS)
@torch.no_grad()
def test_a_relu_is_done_with_its_convolution(name: str) -> None:
    forward, is_one = FORWARDS[name]
    x = torch.randn(5, 12, 8, 8).contiguous(memory_format=LAST)
    result, recording = record(lambda: forward(x))
    names = [call.name for call in fused([call for call in recording.calls if not call.left <= call.read])]
    assert ("_convolution_pointwise" in names) == is_one
    assert ("relu" in names) == (not is_one and name != "another function")
    tape = Tape(recording, known=[x], results=[result])
    tape.replay()
    assert torch.equal(tape.results[0], result)
    x.copy_(torch.randn_like(x))
    tape.replay()
    assert torch.equal(tape.results[0], forward(x))
