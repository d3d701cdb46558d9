"""Differences between a stage before and after local training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fedmp.graph import StateSpec

__all__ = ["apply_update", "difference", "trained_names"]


def trained_names(state: Iterable[StateSpec], *, with_buffers: bool = True) -> tuple[str, ...]:
    """The tensors that training changes: trainable parameters, and buffers such as batch-norm statistics.

    Args:
        state: specs of the tensors in question.
        with_buffers: False leaves buffers out: each client keeps its own.
    """
    return tuple(
        spec.name
        for spec in state
        if (spec.kind == "parameter" and spec.requires_grad) or (spec.kind == "buffer" and with_buffers)
    )


def difference(
    after: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`after - before`, tensor by tensor, in the dtype of the tensors.

    Args:
        after: the trained tensors; decides the names.
        before: the same tensors as the round began; may hold more.
    """
    return {
        name: tensor ^ before[name] if tensor.dtype == torch.bool else tensor - before[name]
        for name, tensor in after.items()
    }


def apply_update(
    state: Mapping[str, torch.Tensor], update: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`state + update` where there is an update, the state itself elsewhere."""
    applied = dict(state)
    for name, change in update.items():
        applied[name] = state[name] ^ change if change.dtype == torch.bool else state[name] + change
    return applied
