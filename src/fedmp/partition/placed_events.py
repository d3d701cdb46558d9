"""The event simulator where devices run several stages: how long one step of a placed schedule takes.

As `events.py`, with three differences. A device runs one action at a time, of whichever of its stages its
list names next. Two stages of one device hand over without a message. And all messages from one device to
another, activations and gradients of any stages, share one link, in the order in which they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fedmp.partition.events import SHARE_OF_HALF, StageTimes, T
from fedmp.schedule import (
    ActionKind,
    PlacedAction,
    peak_in_flight,
    placed_schedule_by_name,
    schedule_by_name,
)

__all__ = ["Placed", "place", "simulate_placed"]


class Placed(NamedTuple):
    """A placed schedule for some number of devices and micro-batches.

    Attributes:
        placement: the stages of each device.
        actions: of each device.
        device_of: each stage's device.
        in_flight: the most micro-batches that each stage holds at once.
    """

    placement: tuple[tuple[int, ...], ...]
    actions: tuple[tuple[PlacedAction, ...], ...]
    device_of: tuple[int, ...]
    in_flight: tuple[int, ...]


@lru_cache(maxsize=128)
def place(schedule: str, num_devices: int, num_microbatches: int) -> Placed:
    """Lay a built-in schedule out for so many devices; one with one stage a device, too."""
    found = placed_schedule_by_name(schedule)
    if found is None:
        plain = schedule_by_name(schedule).actions(num_devices, num_microbatches)
        lists = tuple(tuple(PlacedAction(*action, at) for action in own) for at, own in enumerate(plain))
        each = tuple(range(num_devices))
        return Placed(tuple((at,) for at in each), lists, each, tuple(map(peak_in_flight, lists)))
    placement = tuple(map(tuple, found.placement(num_devices)))
    actions = tuple(map(tuple, found.placed_actions(num_devices, num_microbatches)))
    device_of = {stage: device for device, own in enumerate(placement) for stage in own}
    in_flight = {
        stage: peak_in_flight([action for action in actions[device] if action.stage == stage])
        for stage, device in device_of.items()
    }
    stages = sorted(device_of)
    return Placed(
        placement, actions, tuple(device_of[s] for s in stages), tuple(in_flight[s] for s in stages)
    )


def simulate_placed(
    times: StageTimes[T],
    actions: Sequence[Sequence[PlacedAction]],
    placement: Sequence[Sequence[int]],
) -> T:
    """Seconds of one step of a placed schedule.

    Args:
        times: of one plan (floats) or of many (arrays). Boundaries between two stages of one device are
            free, whatever they say. Each half of a split backward takes half of its time.
        actions: one list a device, as `PlacedSchedule.placed_actions` returns them.
        placement: the stages of each device.

    Raises:
        ValueError: the schedule deadlocks.
    """
    walk = _Walk(times, placement)
    at = [0] * len(actions)
    waiting = list(range(len(actions)))
    while waiting:
        device = waiting.pop()
        for action in actions[device][at[device] :]:
            if not walk.is_ready(action):
                break
            woken = walk.run(device, action)
            at[device] += 1
            if woken is not None and woken != device and woken not in waiting:
                waiting.append(woken)
    if any(position < len(listed) for position, listed in zip(at, actions, strict=True)):
        raise ValueError(
            "the schedule deadlocks: its devices wait for each other; check it with check_placed_actions"
        )
    latest: T = walk.latest()
    return latest


class _Walk:
    """The clocks of a step: when devices and links are free, when what a stage needs has arrived."""

    def __init__(self, times: StageTimes[Any], placement: Sequence[Sequence[int]]) -> None:
        self._times = times
        self._last = times.num_stages - 1
        self._device_of = {stage: device for device, own in enumerate(placement) for stage in own}
        self._maximum = np.maximum if isinstance(times.forward_s[0], np.ndarray) else max
        self._zero = times.forward_s[0] * 0.0
        self._free = [self._zero] * len(placement)
        self._links: dict[tuple[int, int], Any] = {}
        self._inputs: dict[tuple[int, int], Any] = {}
        self._gradients: dict[tuple[int, int], Any] = {}

    def is_ready(self, action: PlacedAction) -> bool:
        """Whether it is known when everything that the action needs arrives."""
        kind, microbatch, stage = action
        if kind is ActionKind.FORWARD:
            return stage == 0 or (stage, microbatch) in self._inputs
        return kind is ActionKind.BACKWARD_WEIGHT or (stage, microbatch) in self._gradients

    def run(self, device: int, action: PlacedAction) -> int | None:
        """Run an action; the device that its result goes to, if any."""
        kind, microbatch, stage = action
        at = (stage, microbatch)
        if kind is ActionKind.FORWARD:
            self._work(device, self._times.forward_s[stage], self._inputs.get(at, self._zero))
            if stage == self._last:
                self._gradients[at] = self._free[device]  # of the loss, which is at hand
                return None
            return self._pass_on(device, self._inputs, stage + 1, microbatch, self._times.send_s[stage])
        if kind is ActionKind.BACKWARD_WEIGHT:
            self._work(device, SHARE_OF_HALF * self._times.backward_s[stage], self._zero)
            return None
        share = 1.0 if kind is ActionKind.BACKWARD else SHARE_OF_HALF
        self._work(device, share * self._times.backward_s[stage], self._gradients[at])
        if stage == 0:
            return None
        return self._pass_on(
            device, self._gradients, stage - 1, microbatch, self._times.gradient_s[stage - 1]
        )

    def latest(self) -> Any:
        """When the last device is done."""
        latest = self._free[0]
        for stop in self._free[1:]:
            latest = self._maximum(latest, stop)
        return latest

    def _work(self, device: int, seconds: Any, arrival: Any) -> None:
        self._free[device] = self._maximum(self._free[device], arrival) + seconds

    def _pass_on(
        self, device: int, arrivals: dict[tuple[int, int], Any], stage: int, microbatch: int, seconds: Any
    ) -> int:
        peer, stop = self._device_of[stage], self._free[device]
        if peer != device:
            link = (device, peer)
            stop = self._links[link] = self._maximum(self._links.get(link, self._zero), stop) + seconds
        arrivals[stage, microbatch] = stop
        return peer
