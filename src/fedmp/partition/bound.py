"""A lower bound on any plan's step time that needs no search, for plans whose partitioner proves nothing.

It lets the model be cut anywhere, at the cheapest boundaries, over the fastest devices first, and ignores
memory: quick and valid for any number of devices, but loose where layers are few or links differ much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmp.partition.estimate import Array, CostModel
from fedmp.partition.space import in_flight_of
from fedmp.topology import Device, Links

__all__ = ["step_bound_s"]


def step_bound_s(costs: CostModel, devices: Sequence[Device], links: Links, schedule: str) -> float:
    """Seconds that no plan's step can go below.

    Args:
        costs: of the model.
        devices, links: what a plan may use.
        schedule: "gpipe", "1f1b" or "1f1b-short".
    """
    wholes = [_whole_s(costs, device) for device in devices]
    if not all(wholes):
        return 0.0
    ways = _least_ways(costs, devices, links)[: len(devices)]
    speeds = np.sort([1 / whole for whole in wholes])[::-1][: len(ways)]
    waiting = _waiting_bound_s(costs, speeds, ways, schedule)
    return max(waiting, _bisect(speeds, ways, costs.num_microbatches))


def _waiting_bound_s(costs: CostModel, speeds: Array, ways: Array, schedule: str) -> float:
    """At least all stages and links once, and the slowest stage M - 1 times more, less what it can hide.

    Under GPipe it hides nothing. Under 1F1B a stage that waits for the way behind it may run the forwards
    that it holds, or as many backwards, meanwhile (`sweep.span_s`): at most the smaller of the two.
    """
    count = costs.num_microbatches
    times = 1 / np.cumsum(speeds)
    least = np.inf
    for num_stages in range(1 + len(costs.forced_positions()), len(speeds) + 1):
        held = 0 if schedule == "gpipe" else in_flight_of(schedule, num_stages, count) - 1
        others = count - 1 - held * _smaller_share(costs)
        # With a slowest stage of t seconds, the sum is least if the fastest devices take t each. That is
        # linear in t between the points where j devices do it all.
        users = np.arange(1, num_stages + 1)
        least = min(least, float(np.min((users + others) * times[:num_stages])) + float(ways[num_stages - 1]))
    return least


def _smaller_share(costs: CostModel) -> float:
    """The smaller of forward and backward as a share of both, for any run of layers at most."""
    edges, device = np.arange(costs.num_layers), Device("reference", costs.profile.reference_flops_per_s)
    forward_s, backward_s = (cost(edges, edges + 1, device) for cost in (costs.forward_s, costs.backward_s))
    busy = forward_s + backward_s > 0
    shares = forward_s[busy] / (forward_s[busy] + backward_s[busy])
    low, high = float(shares.min()), float(shares.max())
    return 0.5 if low <= 0.5 <= high else max(min(low, 1 - low), min(high, 1 - high))


def _bisect(speeds: Array, ways: Array, num_microbatches: int) -> float:
    """The least step time in which the devices together can do all work, up to rounding and from below."""
    low, high = 0.0, num_microbatches / float(speeds[0])
    for _ in range(50):
        middle = (low + high) / 2
        if _most_work(middle, speeds, ways, num_microbatches) >= 1.0:
            high = middle
        else:
            low = middle
    return low


def _most_work(step_s: float, speeds: Array, ways: Array, num_microbatches: int) -> float:
    """The largest part of the model that can be trained in `step_s`.

    A stage must do its M micro-batches in what is left of the step after one micro-batch's way through
    the stages before it and back. Time given to a stage costs each later one 1 / M of it, so the fastest
    devices come first and each takes as much as it can.
    """
    before_s = work = 0.0
    for stage, speed in enumerate(speeds):
        stage_s = (step_s - before_s - ways[stage]) / num_microbatches
        if stage_s <= 0:
            break
        work += float(speed) * stage_s
        before_s += stage_s
    return work


def _least_ways(costs: CostModel, devices: Sequence[Device], links: Links) -> Array:
    """Seconds over the k cheapest boundaries and back, each over its best link, for k = 0, 1, ..."""
    cuts = np.asarray(costs.positions()[1:-1], dtype=np.int64)
    names = [device.name for device in devices]
    used = {links.between(a, b) for index, a in enumerate(names) for b in names[:index]}
    if not used or not len(cuts):
        return np.zeros(1)
    cheapest = np.min([costs.send_s(cuts, link) + costs.gradient_s(cuts, link) for link in used], axis=0)
    return np.concatenate(([0.0], np.cumsum(np.sort(cheapest))))


def _whole_s(costs: CostModel, device: Device) -> float:
    return float(costs.forward_s(0, costs.num_layers, device) + costs.backward_s(0, costs.num_layers, device))
