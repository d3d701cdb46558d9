"""Fewer places to cut, for models with so many layers that a search over all of them would take too long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmp.partition.estimate import CostModel
from fedmp.topology import Device

__all__ = ["coarse_positions"]

_REFERENCE = Device("reference", flops_per_s=1.0)


def coarse_positions(costs: CostModel, num_positions: int) -> list[int]:
    """So many places to cut, with both ends: each share of the time keeps its smallest boundary.

    Forced cuts, and those where pinned layers begin and end, are kept besides.
    """
    positions = costs.positions()
    return positions if len(positions) <= num_positions else _spread(costs, positions, num_positions)


def _spread(costs: CostModel, positions: Sequence[int], wanted: int) -> list[int]:
    edges = np.asarray(positions)
    done = costs.forward_s(0, edges, _REFERENCE) + costs.backward_s(0, edges, _REFERENCE)
    whole = float(done[-1]) or 1.0
    share = np.minimum((done[1:-1] / whole * (wanted - 1)).astype(int), wanted - 2)
    kept = []
    for index in np.unique(share):
        inside = edges[1:-1][share == index]
        kept.append(int(inside[np.argmin(costs.boundary_bytes(inside))]))
    layers = costs.profile.layers
    ruled = [
        int(edge)
        for edge in edges[1:-1]
        if layers[edge - 1].must_cut_after or layers[edge - 1].device != layers[edge].device
    ]
    return [0, *sorted({*kept, *ruled}), int(edges[-1])]
