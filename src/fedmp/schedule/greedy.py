"""A scheduler that lets every device do the most urgent thing that is ready, tick by tick."""

from __future__ import annotations

from collections.abc import Sequence

from fedmp.schedule.actions import ActionKind, PlacedAction, is_ready

__all__ = ["greedy"]


def greedy(
    placement: Sequence[Sequence[int]], num_microbatches: int, limits: Sequence[int], *, splits: bool
) -> list[list[PlacedAction]]:
    """Let every device do the most urgent thing that is ready, tick by tick; complete by construction.

    Args:
        placement: the stages of each device.
        num_microbatches: micro-batches of the step.
        limits: activations that each device should not exceed; exceeded only where all would wait.
        splits: whether backwards come in two halves.
    """
    num_stages = sum(map(len, placement))
    devices = [_GreedyDevice(own, num_microbatches, splits) for own in placement]
    done: set[PlacedAction] = set()
    total = num_stages * num_microbatches * (3 if splits else 2)
    while len(done) < total:
        finished = [device.tick() for device in devices]
        done.update(action for action in finished if action is not None)
        started = False
        for device, limit in zip(devices, limits, strict=True):
            started |= device.start(done, limit, num_stages)
        if not started and not any(device.is_busy for device in devices) and len(done) < total:
            blocked = [device for device in devices if device.is_ready(done, num_stages)]
            min(blocked, key=lambda device: device.alive).start(done, total, num_stages)
    return [device.actions for device in devices]


class _GreedyDevice:
    """A device of the greedy scheduler: what is left to do, by kind, and what runs now."""

    def __init__(self, stages: Sequence[int], num_microbatches: int, splits: bool) -> None:
        group = num_microbatches if len(stages) == 1 else _group(stages)
        pairs = [(stage, index) for stage in stages for index in range(num_microbatches)]
        in_groups = sorted(pairs, key=lambda pair: (pair[1] // group, pair[0], pair[1]))
        self._forwards = [PlacedAction(ActionKind.FORWARD, index, stage) for stage, index in in_groups]
        kind = ActionKind.BACKWARD_INPUT if splits else ActionKind.BACKWARD
        latest_first = sorted(pairs, key=lambda pair: (pair[1] // group, -pair[0], pair[1]))
        self._backwards = [PlacedAction(kind, index, stage) for stage, index in latest_first]
        self._weights: list[PlacedAction] = []
        self._left = 0
        self._running: PlacedAction | None = None
        self.alive = 0
        self.actions: list[PlacedAction] = []

    @property
    def is_busy(self) -> bool:
        return self._running is not None

    def tick(self) -> PlacedAction | None:
        """Let one unit of time pass; the action that ended, if one did."""
        self._left -= 1
        if self._running is None or self._left > 0:
            return None
        ended, self._running = self._running, None
        if ended.kind is ActionKind.BACKWARD_INPUT:
            self._weights.append(ended._replace(kind=ActionKind.BACKWARD_WEIGHT))
        return ended

    def is_ready(self, done: set[PlacedAction], num_stages: int) -> bool:
        return self._next(done, 1 << 30, num_stages) is not None

    def start(self, done: set[PlacedAction], limit: int, num_stages: int) -> bool:
        """Start the most urgent action that is ready, if the device is free."""
        if self._running is not None:
            return False
        action = self._next(done, limit, num_stages)
        if action is None:
            return False
        for waiting in (self._forwards, self._backwards, self._weights):
            if action in waiting:
                waiting.remove(action)
        self.alive += {ActionKind.FORWARD: 1, ActionKind.BACKWARD_INPUT: 0}.get(action.kind, -1)
        self._running, self._left = action, 2 if action.kind is ActionKind.BACKWARD else 1
        self.actions.append(action)
        return True

    def _next(self, done: set[PlacedAction], limit: int, num_stages: int) -> PlacedAction | None:
        for action in self._backwards:
            if is_ready(action, done, num_stages):
                return action
        if self.alive < limit:
            for action in self._forwards:
                if is_ready(action, done, num_stages):
                    return action
        return self._weights[0] if self._weights else None


def _group(stages: Sequence[int]) -> int:
    """Micro-batches that pass one of a device's stages before the next one gets its turn."""
    return max(1, min(b - a for a, b in zip(stages[:-1], stages[1:], strict=True)))
