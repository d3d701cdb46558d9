"""Fewer places to cut, for models with so many layers that a search over all of them would take too long."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fedmp.partition.estimate import CostModel
from fedmp.topology import Device

__all__ = ["coarse_positions", "near_positions"]

_REFERENCE = Device("reference", flops_per_s=1.0)


def coarse_positions(costs: CostModel, *, max_cells: int, num_states: int) -> Iterator[list[int]]:
    """Places to cut, few enough for a search; then all of them, in case nothing fits the few.

    Args:
        costs: of the model.
        max_cells: lattice states times pairs of places that a search may have.
        num_states: lattice states.
    """
    positions = costs.positions()
    wanted = max(8, math.isqrt(max_cells // num_states))
    if len(positions) > wanted:
        yield _spread(costs, positions, wanted)
    yield positions


def near_positions(positions: Sequence[int], kept: Sequence[int], reach: int) -> list[int]:
    """Those of `positions` that are within `reach` places of one of `kept`, and both ends."""
    at = np.searchsorted(positions, kept)
    near = {int(index) + offset for index in at for offset in range(-reach, reach + 1)}
    return [position for index, position in enumerate(positions) if index in near]


def _spread(costs: CostModel, positions: Sequence[int], wanted: int) -> list[int]:
    """Divide the model into equal shares of time and keep each share's cut with the smallest boundary."""
    edges = np.asarray(positions)
    done = costs.forward_s(0, edges, _REFERENCE) + costs.backward_s(0, edges, _REFERENCE)
    whole = float(done[-1]) or 1.0
    share = np.minimum((done[1:-1] / whole * (wanted - 1)).astype(int), wanted - 2)
    kept = []
    for index in np.unique(share):
        inside = edges[1:-1][share == index]
        kept.append(int(inside[np.argmin(costs.boundary_bytes(inside))]))
    return [0, *kept, int(edges[-1])]
