"""Operations of a tape that the processor's library does in one: a convolution with the ReLU of what it gives.

The same numbers bit for bit, since the same kernel computes them; what lies between is never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedmp.cohort.recording import Call, Place

__all__ = ["fused"]

aten = torch.ops.aten


def fused(calls: Sequence[Call]) -> list[Call]:
    """The calls, those that go together as one."""
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return list(calls)
    touching: dict[int, list[int]] = {}
    for index, call in enumerate(calls):
        for storage in call.read | call.left:
            touching.setdefault(storage, []).append(index)
    found = list[Call | None](calls)
    for index, call in enumerate(calls):
        if call.func is not aten.convolution.default:
            continue
        made = call.outputs[0]
        users = touching[made.storage]
        after = calls[users[1]] if len(users) == 2 else None
        if after is not None and _is_relu_of(after, made) and _is_by_the_library(call):
            result = replace(made, storage=after.outputs[0].storage)
            found[index], found[users[1]] = _with_relu(call, result), None
    return [call for call in found if call is not None]


def _is_relu_of(call: Call, made: Place) -> bool:
    """Whether a call gives the ReLU of all that a storage holds, each entry at the place where it was."""
    if call.func is not aten.relu.default:
        return False
    (given,), (result,) = call.inputs, call.outputs
    is_whole = torch.Size(given.size).numel() == torch.Size(made.size).numel()
    return given.view == result.view and given.offset == made.offset == 0 and is_whole


def _is_by_the_library(call: Call) -> bool:
    """Whether torch leaves a convolution to oneDNN, of images with channels last as well as its result."""
    x, weight, bias, stride, padding, dilation, is_transposed, output_padding, groups = call.args
    if len(x.size) != 4 or is_transposed or x.dtype != torch.float32:
        return False
    places = [place for place in (x, weight, bias) if place is not None]
    like = [torch.empty_strided(place.size, place.stride, dtype=place.dtype) for place in places]
    last = [torch.empty_strided(place.size, place.stride) for place in (x, call.outputs[0])]
    if not all(each.is_contiguous(memory_format=torch.channels_last) for each in last):
        return False
    choose: Any = torch._C._select_conv_backend
    given = like if bias is not None else [*like, None]
    chosen = choose(*given, stride, padding, dilation, False, output_padding, groups)
    return bool(chosen == torch._C._ConvBackend.Mkldnn)  # type: ignore[attr-defined]


def _with_relu(call: Call, result: Place) -> Call:
    x, weight, bias, stride, padding, dilation, _, _, groups = call.args
    func = torch.ops.mkldnn._convolution_pointwise.default
    return Call(func, (x, weight, bias, padding, stride, dilation, groups, "relu", [], None), {}, result)
