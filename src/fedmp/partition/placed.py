"""Plans for schedules that give a device several stages or split backwards: one way for all partitioners.

Stages of one device share its time and memory, wherever they lie in the model, and weight gradients fill
bubbles, so the dynamic programs and bounds of the other searches do not apply. Where there are few choices
all are tried, which proves the best; where there are many, cuts are shifted from several starts for as long
as the event simulator says that it helps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmp.errors import InfeasibleError, PlanError
from fedmp.partition.build import build_plan
from fedmp.partition.estimate import Array, CostModel, format_bytes
from fedmp.partition.events import StageTimes
from fedmp.partition.placed_events import Placed, place, simulate_placed
from fedmp.records import Plan
from fedmp.schedule import placed_schedule_by_name
from fedmp.topology import Device, Links

__all__ = ["is_placed", "plan_placed", "some_orders", "step_bound_placed_s"]

IntArray = npt.NDArray[np.int64]

_MAX_TRIED = 20_000  # choices of one search, if all of them are tried
_MAX_ORDERS = 64  # orders of devices to try
_MAX_TURNS = 60  # of shifting cuts, from one start
_BROKEN_RULE_BYTES = 2.0**70  # more than anything needs, so that a search first keeps the cut rules


@dataclass(frozen=True)
class _Choice:
    """Cuts for devices in an order, with what exceeds their memory (0 if they fit) and the step time."""

    devices: tuple[Device, ...]
    edges: tuple[int, ...]
    excess_bytes: float
    tightest: str
    step_s: float

    @property
    def rank(self) -> tuple[float, float]:
        return self.excess_bytes, self.step_s


def is_placed(schedule: str) -> bool:
    """Whether a built-in schedule's plans are made here."""
    return schedule == "zero-bubble" or placed_schedule_by_name(schedule) is not None


def plan_placed(
    costs: CostModel,
    devices: Sequence[Device],
    links: Links,
    schedule: str,
    *,
    orders: Iterable[Sequence[Device]],
    is_every_order: bool,
    partitioner: str,
) -> Plan:
    """The best plan that is found for a schedule of which `is_placed` is true.

    Args:
        costs: of the model.
        devices, links: the client's.
        schedule: its name.
        orders: of devices to try; each may leave some out.
        is_every_order: whether `orders` are all that there are, so that trying all cuts is a proof.
        partitioner: name of who asks.

    Returns:
        The plan. Its `bound_s` is its `step_s` where every choice was tried; else that of
        `step_bound_placed_s`, which is loose.

    Raises:
        PlanError: the model has fewer pieces than the schedule needs stages on one device, or cut rules
            cannot be kept.
        InfeasibleError: nothing that was tried fits.
    """
    positions = costs.positions()
    best: _Choice | None = None
    is_proved = is_every_order
    for order in orders:
        placed = place(schedule, len(order), costs.num_microbatches)
        if len(placed.device_of) > len(positions) - 1:
            continue  # no plan has so many stages
        search = _Search(costs, tuple(order), links, placed, positions)
        found, tried_all = search.best()
        is_proved &= tried_all
        best = found if best is None or found.rank < best.rank else best
    if best is None:
        fewest = len(place(schedule, 1, 1).device_of)
        raise PlanError(
            f"schedule {schedule!r} needs {fewest} stages on each device, but the model can be cut into "
            f"{len(positions) - 1} pieces at most; use a schedule with one stage a device, such as '1f1b'"
        )
    if best.excess_bytes >= _BROKEN_RULE_BYTES / 2:
        raise PlanError(
            f"no plan was found that keeps the forced cuts and pinned layers under the schedule {schedule!r}; "
            f"change the rules, or use a schedule with one stage a device, such as '1f1b'"
        )
    if best.excess_bytes > 0:
        raise _infeasible(costs, devices, schedule, best)
    used = {device.name for device in best.devices}
    placed = place(schedule, len(best.devices), costs.num_microbatches)
    bound_s = best.step_s if is_proved else step_bound_placed_s(costs, devices)
    return build_plan(
        costs.profile,
        [best.devices[device] for device in placed.device_of],
        best.edges[1:-1],
        links,
        num_microbatches=costs.num_microbatches,
        schedule=schedule,
        partitioner=partitioner,
        bound_s=bound_s,
        unused_devices=[device.name for device in devices if device.name not in used],
    )


def step_bound_placed_s(costs: CostModel, devices: Sequence[Device]) -> float:
    """Seconds that no step can go below: all the work shared perfectly, or one micro-batch's own way.

    A micro-batch waits for the forwards and the input gradients of all layers, which count as half of the
    backwards.
    """
    forward = [float(costs.forward_s(0, costs.num_layers, device)) for device in devices]
    backward = [float(costs.backward_s(0, costs.num_layers, device)) for device in devices]
    wholes = [f + b for f, b in zip(forward, backward, strict=True)]
    if not all(wholes):
        return 0.0
    shared = costs.num_microbatches / sum(1 / whole for whole in wholes)
    alone = min(f + b / 2 for f, b in zip(forward, backward, strict=True))
    return max(shared, alone)


def some_orders(devices: Sequence[Device], *, in_order: bool) -> tuple[list[tuple[Device, ...]], bool]:
    """Orders of devices worth trying, each of some of them.

    Args:
        devices: the client's.
        in_order: keep the order given; only leave devices out, the slowest first.

    Returns:
        The orders, and whether they are all that there are.
    """
    if not in_order and sum(math.perm(len(devices), k) for k in range(1, len(devices) + 1)) <= _MAX_ORDERS:
        every = [itertools.permutations(devices, count) for count in range(1, len(devices) + 1)]
        return [order for orders in every for order in orders], True
    ways = [list(devices)]
    if not in_order:
        ways.append(sorted(devices, key=lambda device: -device.flops_per_s))
        ways.append(sorted(devices, key=lambda device: -device.memory_bytes))
        ways.append(ways[1][::-1])
    orders: dict[tuple[str, ...], tuple[Device, ...]] = {}
    for way in ways:
        for count in range(len(way), 0, -1):
            kept = sorted(way, key=lambda device: -device.flops_per_s)[:count]
            order = tuple(device for device in way if device in kept)
            orders.setdefault(tuple(device.name for device in order), order)
    return list(orders.values()), len(devices) == 1


class _Search:
    """Cuts for devices in one order."""

    def __init__(
        self,
        costs: CostModel,
        devices: tuple[Device, ...],
        links: Links,
        placed: Placed,
        positions: Sequence[int],
    ) -> None:
        self._costs = costs
        self._devices = devices
        self._placed = placed
        self._on = [devices[device] for device in placed.device_of]
        self._links = [
            None if a.name == b.name else links.between(a.name, b.name)
            for a, b in itertools.pairwise(self._on)
        ]
        self._positions: IntArray = np.asarray(positions)
        self._parameter_bytes = costs.parameter_matrix(positions)

    def best(self) -> tuple[_Choice, bool]:
        """The best cuts that are found, and whether all were tried."""
        inner, num_cuts = len(self._positions) - 2, len(self._on) - 1
        if math.comb(inner, num_cuts) <= _MAX_TRIED:
            every = [(0, *cuts, inner + 1) for cuts in itertools.combinations(range(1, inner + 1), num_cuts)]
            return self._choose(np.asarray(every)), True
        starts = [self._shared([1.0] * len(self._on)), self._shared([d.flops_per_s for d in self._on])]
        starts.append(self._shared([float(device.memory_bytes) for device in self._on]))
        return min((self._shift(start) for start in starts), key=lambda choice: choice.rank), False

    def _shift(self, edges: IntArray) -> _Choice:
        """Move one cut, or two, for as long as it helps."""
        best = self._choose(edges[None])
        for _ in range(_MAX_TURNS):
            units = np.searchsorted(self._positions, best.edges)
            found = self._choose(_shifted(units))
            if found.rank >= best.rank:
                break
            best = found
        return best

    def _shared(self, weights: Sequence[float]) -> IntArray:
        """Edges that give each stage about its share of the work, and at least one unit."""
        work = self._costs.forward_s(0, self._positions, self._on[0])
        work = work + self._costs.backward_s(0, self._positions, self._on[0])
        wanted = np.cumsum([0.0, *weights]) / sum(weights) * work[-1]
        edges = np.searchsorted(work, wanted)
        num_units, num_stages = len(self._positions) - 1, len(weights)
        edges[0], edges[-1] = 0, num_units
        for stage in range(1, num_stages):
            edges[stage] = min(max(edges[stage], edges[stage - 1] + 1), num_units - num_stages + stage)
        return np.asarray(edges, dtype=np.int64)

    def _choose(self, edges: IntArray) -> _Choice:
        """The best of many choices of edges, shape (choices, stages + 1)."""
        needed = self._needed_bytes(edges)
        limits = np.asarray([[float(device.memory_bytes)] for device in self._devices])
        excess = np.maximum(needed - limits, 0.0)
        seconds = self._step_s(edges)
        at = int(np.lexsort((seconds, excess.max(axis=0)))[0])
        return _Choice(
            self._devices,
            tuple(self._positions[edges[at]].tolist()),
            float(excess[:, at].max()),
            self._devices[int(excess[:, at].argmax())].name,
            float(seconds[at]),
        )

    def _needed_bytes(self, edges: IntArray) -> Array:
        """Memory by (device, choice): that of all of the device's stages."""
        needed = np.zeros((len(self._devices), len(edges)))
        for stage, (device, in_flight) in enumerate(
            zip(self._placed.device_of, self._placed.in_flight, strict=True)
        ):
            first, end = edges[:, stage], edges[:, stage + 1]
            start, stop = self._positions[first], self._positions[end]
            parameter_bytes = self._parameter_bytes[first, end]
            needed[device] += np.ceil(self._costs.memory_bytes(start, stop, in_flight, parameter_bytes))
            needed[device] += _BROKEN_RULE_BYTES * self._costs.num_broken(start, stop, self._on[stage])
        return needed

    def _step_s(self, edges: IntArray) -> Array:
        at = self._positions[edges]
        stages = [(at[:, stage], at[:, stage + 1], device) for stage, device in enumerate(self._on)]
        none = np.zeros(len(edges))
        links = list(enumerate(self._links, start=1))
        times: StageTimes[Array] = StageTimes(
            forward_s=[self._costs.forward_s(*stage) for stage in stages],
            backward_s=[self._costs.backward_s(*stage) for stage in stages],
            send_s=[none if link is None else self._costs.send_s(at[:, cut], link) for cut, link in links],
            gradient_s=[
                none if link is None else self._costs.gradient_s(at[:, cut], link) for cut, link in links
            ],
        )
        return simulate_placed(times, self._placed.actions, self._placed.placement)


def _shifted(edges: IntArray) -> IntArray:
    """The same edges with one or two of the cuts moved by 1, 2 or 4, where they still increase."""
    num_cuts = len(edges) - 2
    moves = [
        np.asarray([[cut == moved for cut in range(num_cuts)]], dtype=np.int64) for moved in range(num_cuts)
    ]
    both = [one + sign * two for one, two in itertools.combinations(moves, 2) for sign in (1, -1)]
    steps = np.concatenate([*moves, *both]) if moves else np.zeros((0, 0), dtype=np.int64)
    signed = np.concatenate([size * steps for size in (1, -1, 2, -2, 4, -4)]) if num_cuts else steps
    tried = np.repeat(edges[None], len(signed) + 1, axis=0)
    tried[1:, 1:-1] += signed
    kept: IntArray = tried[(np.diff(tried, axis=1) > 0).all(axis=1)]
    return kept


def _infeasible(
    costs: CostModel, devices: Sequence[Device], schedule: str, nearest: _Choice
) -> InfeasibleError:
    ways = [f"with {format_bytes(nearest.excess_bytes)} more on device {nearest.tightest!r}"]
    ways.append("with a schedule of one stage a device that holds fewer activations, such as '1f1b-short'")
    if costs.microbatch_size > 1:
        ways.append(f"with a smaller micro-batch (now {costs.microbatch_size})")
    return InfeasibleError(
        f"the model does not fit the {len(devices)} devices under the schedule {schedule!r}; it would "
        f"{', or '.join(ways)}"
    )
