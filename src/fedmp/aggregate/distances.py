"""Distances between whole clients, without assembling one: inner products summed over tensors and blocks.

`gram` reads every tensor once and keeps an n x n matrix of inner products in float64. Squared distances
between clients, and from any weighted combination of clients to each of them, follow from it, so the rules
that compare clients (Krum, geometric median, clipping) read the updates twice at most: once to compare, once to
combine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedmp.aggregate.blocks import non_finite, read, weighted_sum
from fedmp.aggregate.median import median_of

__all__ = ["combination", "gram", "squared_distances", "squared_distances_to"]

_BLOCK_BYTES = 4 << 20


def gram(updates: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Inner products of the clients' updates over all floating tensors, [n, n] float64.

    Counters and flags do not count: they are no part of the step that a client proposes. float64 keeps what
    cancels in distances between updates that are nearly equal.

    Raises:
        ValueError: an update holds NaN or infinity, or float64 numbers whose squares overflow.
    """
    num_clients = len(updates)
    products = torch.zeros(num_clients, num_clients, dtype=torch.float64)
    buffer = torch.empty(num_clients, max(64, _BLOCK_BYTES // (8 * num_clients)), dtype=torch.float64)
    for name in sorted(updates[0]):  # whatever order a client's plan has them in
        _add_products(products, updates, name, buffer)
    return products


def squared_distances(products: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances between clients, [n, n], of their inner products."""
    squares = products.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0)
    return distances.fill_diagonal_(0)


def squared_distances_to(products: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Squared distances of each client from the combination `sum_i coefficients[i] * u_i`, [n]."""
    towards = (products * coefficients).sum(dim=1)  # small, and often called: not worth a BLAS's threads
    return (products.diagonal() - 2 * towards + (coefficients * towards).sum()).clamp(min=0)


def combination(
    updates: Sequence[Mapping[str, torch.Tensor]], coefficients: Sequence[float]
) -> dict[str, torch.Tensor]:
    """`sum_i coefficients[i] * u_i` of the floating tensors; counters and flags by their median.

    A client whose step looks honest might still lie about a counter, so those get a vote of all.
    """
    kept = [index for index, coefficient in enumerate(coefficients) if coefficient != 0] or [0]
    chosen, shares = [updates[index] for index in kept], [coefficients[index] for index in kept]
    return {
        name: weighted_sum(chosen, name, shares)
        if is_floating(updates[0][name])
        else median_of(updates, name)
        for name in updates[0]
    }


def is_floating(tensor: torch.Tensor) -> bool:
    """Whether a tensor is part of the step: floating or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def _add_products(
    products: torch.Tensor, updates: Sequence[Mapping[str, torch.Tensor]], name: str, buffer: torch.Tensor
) -> None:
    """Add one tensor's inner products, a block at a time."""
    if not is_floating(updates[0][name]):
        return
    tensors = [_as_real(tensor) for tensor in read(updates, name)]
    num_elements, block = tensors[0].numel(), buffer.shape[1]
    for start in range(0, num_elements, block):
        rows = buffer[:, : min(block, num_elements - start)]
        for row, tensor in zip(rows, tensors, strict=True):
            row.copy_(tensor[start : start + block])
        products.addmm_(rows, rows.t())
    if not bool(torch.isfinite(products.diagonal()).all()):
        raise ValueError(non_finite(updates, name))


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor
