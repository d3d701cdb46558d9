"""A matrix as the product of two thin ones.

PowerSGD (Vogels et al., 2019, algorithm 1 and 2): one step of subspace iteration, begun from the last
round's result, with the chain's error feedback. Where we differ: each client iterates on its own update and sends
both factors. There, workers average the first factor before they make it orthogonal, which takes two
exchanges and gives one subspace for all; here a client's update can be decoded by itself, as robust
aggregators need it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.updates.transform import Encoded, Part, generator, like, working_dtype

__all__ = ["LowRank"]


class LowRank(Component):
    """Matrices, and what can be seen as one: [rows, ...] as [rows, all else]. Others stay as they are.

    Args:
        rank: columns of the two factors. A tensor whose factors would not be smaller than it stays as it is.
        error_feedback: add what was lost to the next round's update.
    """

    rank: int = Field(default=2, ge=1)
    error_feedback: bool = True

    def layout(self, spec: Part) -> dict[str, Part]:
        """The two factors."""
        if len(spec.shape) < 2 or spec.numel == 0:
            return like(spec)
        rows, columns = spec.shape[0], spec.numel // spec.shape[0]
        if self.rank * (rows + columns) >= spec.numel:
            return like(spec)
        return {"left": Part((rows, self.rank), spec.dtype), "right": Part((columns, self.rank), spec.dtype)}

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """One step of subspace iteration."""
        matrix = tensor.detach().reshape(tensor.shape[0], -1).to(working_dtype(tensor.dtype))
        start = state.get("start")
        if start is None or not bool(start.any()):
            start = torch.randn(matrix.shape[1], self.rank, generator=generator(seed), dtype=matrix.dtype)
        left = torch.linalg.qr(matrix @ start.to(matrix.dtype)).Q
        right = matrix.T @ left
        parts = {"left": left.to(tensor.dtype), "right": right.to(tensor.dtype)}
        return Encoded(parts, {"start": right})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        """Their product."""
        working = working_dtype(spec.dtype)
        product = parts["left"].to(working) @ parts["right"].to(working).T
        return product.view(spec.shape).to(spec.dtype)
