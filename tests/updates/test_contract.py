"""The contract suite: every transform passes it, and broken ones do not. One line for each new one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fedmp.updates import (
    EF21,
    BFloat16,
    Chain,
    Encoded,
    Float16,
    Int4,
    Int8,
    LowRank,
    Part,
    RandomK,
    Sign,
    TopK,
    UpdateTransform,
)
from fedmp.updates.contract import check_transform


class Halved:
    """The smallest transform of a user's own: half of every number, at full price."""

    def __repr__(self) -> str:
        return "Halved()"

    error_feedback = True

    def layout(self, spec: Part) -> dict[str, Part]:
        return {"half": spec}

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        return Encoded({"half": tensor / 2}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        return parts["half"]


@pytest.mark.parametrize(
    ("transform", "is_unbiased"),
    [
        (BFloat16(), False),
        (BFloat16(error_feedback=True), False),
        (Float16(), False),
        (Int8(), True),
        (Int8(block=8), True),
        (Int4(), True),
        (Int4(block=64, error_feedback=True), False),
        (TopK(), False),
        (TopK(fraction=0.001), False),
        (TopK(fraction=0.2), False),
        (TopK(fraction=1.0), False),
        (RandomK(fraction=0.1), False),
        (RandomK(fraction=0.07, error_feedback=False), True),
        (LowRank(), False),
        (LowRank(rank=4), False),
        (Sign(), False),
        (Sign(block=64), False),
        (Chain([TopK(fraction=0.1), Int8()]), False),
        (Chain([LowRank(), BFloat16(), Int4()]), False),
        (Chain([RandomK(fraction=0.2, error_feedback=False), Int4()]), True),
        (Chain([EF21(), TopK(fraction=0.1)]), False),
        (Chain([EF21(), LowRank(rank=4), BFloat16()]), False),
        (Chain([EF21(), RandomK(fraction=0.2)]), False),
        (Chain([EF21(), Sign()]), False),
        (Chain([]), True),
        (Halved(), False),
    ],
    ids=repr,
)
def test_every_transform_keeps_the_contract(transform: UpdateTransform, is_unbiased: bool) -> None:
    check_transform(transform, is_unbiased=is_unbiased)


class _Doubled(Halved):
    """Overshoots: what is lost is as much as was to be sent, and more each round."""

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        return parts["half"] * 4.5


class _Forgetful(Halved):
    """Draws from the global generator instead of its seed."""

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        return Encoded({"half": tensor / 2 + torch.randn(()).to(tensor.dtype)}, {})


class _Careless(Halved):
    """Scales the very tensor that it is given."""

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        return Encoded({"half": tensor.div_(2)}, {})


class _Misleading(Halved):
    """Makes other parts than its layout tells of."""

    def layout(self, spec: Part) -> dict[str, Part]:
        return {"half": Part((spec.numel,), spec.dtype)}


class _Trusting(Halved):
    """Takes places as they come."""

    def layout(self, spec: Part) -> dict[str, Part]:
        return {"values": spec, "places": Part((spec.numel,), torch.int64)}

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        return Encoded({"values": tensor, "places": torch.arange(tensor.numel())}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        return parts["values"].flatten()[parts["places"]].view(spec.shape)


@pytest.mark.parametrize(
    ("transform", "is_unbiased", "message"),
    [
        (_Doubled(), False, "so what is lost would grow"),
        (_Forgetful(), False, "the same seed gives other parts"),
        (_Careless(), False, "encode changes the tensor"),
        (_Misleading(), False, "must be"),
        (_Trusting(), False, "a made-up payload raises IndexError"),
        (Sign(error_feedback=False), True, "as far off as chance"),
        (object(), False, "lacks methods"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_contract_finds_a_broken_transform(transform: object, is_unbiased: bool, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_transform(transform, is_unbiased=is_unbiased)  # type: ignore[arg-type]
