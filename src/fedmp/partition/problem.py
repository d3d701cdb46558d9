"""A planning problem as numpy arrays: what the built-in partitioners search over.

Layers are merged into units between places that may be cut, and devices that nothing tells apart (same
speed, memory and links) into kinds, so that a search never tries the same thing twice. Units are counted
like layers: a stage is the units from index `i` to index `j` of `positions`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmp.partition.estimate import Array, CostModel
from fedmp.topology import Device, Links

__all__ = ["BoolArray", "Problem", "make_problem"]

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Problem:
    """Costs by unit and by kind of device. Make one with `make_problem`.

    Attributes:
        costs: the cost model underneath.
        positions: the layer before which each unit starts, and the number of layers.
        devices: the client's devices.
        kinds: groups of interchangeable devices, as indices into `devices`.
        send_s, gradient_s: shape (kinds, kinds, units + 1); seconds over a cut at a unit, from a device
            of the first kind to one of the second, and back.
    """

    costs: CostModel
    positions: tuple[int, ...]
    devices: tuple[Device, ...]
    links: Links
    kinds: tuple[tuple[int, ...], ...]
    send_s: Array
    gradient_s: Array
    _starts: npt.NDArray[np.int64]
    _stops: npt.NDArray[np.int64]
    _parameter_bytes: Array
    _known: dict[tuple[str, int], Array] = field(default_factory=dict, repr=False)
    _allowed: dict[int, BoolArray] = field(default_factory=dict, repr=False)

    @property
    def num_units(self) -> int:
        """Runs of layers that no plan cuts."""
        return len(self.positions) - 1

    def forward_s(self, kind: int) -> Array:
        """Seconds of a stage's forward by (first unit, end unit); infinite where that is no stage."""
        return self._once(("forward", kind), self.costs.forward_s, self.device_of(kind))

    def backward_s(self, kind: int) -> Array:
        """Seconds of a stage's backward by (first unit, end unit); infinite where that is no stage."""
        return self._once(("backward", kind), self.costs.backward_s, self.device_of(kind))

    def memory_bytes(self, in_flight: int) -> Array:
        """Memory of a stage by (first unit, end unit); infinite where that is no stage."""
        memory_bytes = self.costs.memory_bytes
        return self._once(("memory", in_flight), memory_bytes, in_flight, self._parameter_bytes)

    def fits(self, kind: int, in_flight: int) -> BoolArray:
        """Whether a device of that kind may and can hold a stage, by (first unit, end unit)."""
        limit = float(self.device_of(kind).memory_bytes)
        return self.allows(kind) & (self.memory_bytes(in_flight) <= limit)

    def allows(self, kind: int) -> BoolArray:
        """Whether the cut rules let a device of that kind hold a stage, by (first unit, end unit)."""
        if kind not in self._allowed:
            self._allowed[kind] = self.costs.num_broken(self._starts, self._stops, self.device_of(kind)) == 0
        return self._allowed[kind]

    def _once(self, key: tuple[str, int], cost: Callable[..., Array], *rest: Any) -> Array:
        if key not in self._known:
            by_stage = cost(self._starts, self._stops, *rest)
            self._known[key] = np.where(self._starts < self._stops, by_stage, np.inf)
        return self._known[key]

    def device_of(self, kind: int) -> Device:
        """One device of that kind; the others are like it."""
        return self.devices[self.kinds[kind][0]]


def make_problem(
    costs: CostModel,
    devices: Sequence[Device],
    links: Links,
    *,
    positions: Sequence[int] | None = None,
    merge_devices: bool = True,
) -> Problem:
    """Arrange costs for a search.

    Args:
        costs: of the model.
        devices, links: the client's.
        positions: where cuts are considered, with both ends of the model; by default all that are allowed.
        merge_devices: whether interchangeable devices form one kind; False where their order counts.
    """
    positions = tuple(costs.positions() if positions is None else positions)
    pinned = {layer.device for layer in costs.profile.layers}
    kinds = (
        _kinds(devices, links, pinned) if merge_devices else tuple((index,) for index in range(len(devices)))
    )
    edges = np.asarray(positions)
    starts, stops = np.meshgrid(edges, edges, indexing="ij")
    send_s = np.zeros((len(kinds), len(kinds), len(edges)))
    gradient_s = np.zeros_like(send_s)
    for first, ours in enumerate(kinds):
        for second, theirs in enumerate(kinds):
            # Two stages of one kind are on two different devices of it, if it has as many.
            link = links.between(devices[ours[0]].name, devices[theirs[-1]].name)
            send_s[first, second] = costs.send_s(edges, link)
            gradient_s[first, second] = costs.gradient_s(edges, link)
    return Problem(
        costs=costs,
        positions=positions,
        devices=tuple(devices),
        links=links,
        kinds=kinds,
        send_s=send_s,
        gradient_s=gradient_s,
        _starts=starts,
        _stops=stops,
        _parameter_bytes=costs.parameter_matrix(positions),
    )


def _kinds(
    devices: Sequence[Device], links: Links, pinned: Collection[str | None]
) -> tuple[tuple[int, ...], ...]:
    """Groups of devices that nothing tells apart; one that layers are pinned to is alone in its group."""
    groups: list[list[int]] = []
    for index, device in enumerate(devices):
        for group in groups:
            is_free = device.name not in pinned and devices[group[0]].name not in pinned
            if is_free and _are_alike(devices[group[0]], device, devices, links):
                group.append(index)
                break
        else:
            groups.append([index])
    return tuple(map(tuple, groups))


def _are_alike(first: Device, second: Device, devices: Sequence[Device], links: Links) -> bool:
    """Whether swapping the two changes nothing; transitive, so that one of a group speaks for all."""
    if (first.flops_per_s, first.memory_bytes) != (second.flops_per_s, second.memory_bytes):
        return False
    if not links.pairs:
        return True
    others = [device.name for device in devices if device.name not in (first.name, second.name)]
    return all(links.between(first.name, name) == links.between(second.name, name) for name in others)
