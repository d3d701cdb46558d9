"""What a device's actions are measured with, and slowed down by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from fedmp.pipeline.options import Pace
from fedmp.records import TimedAction
from fedmp.schedule import ActionKind

__all__ = ["Clock"]


class Clock:
    """Tells an observer what the device did when; makes actions last as long as on a slower device.

    Args:
        device_name: for the timed actions.
        pace: of the device that is emulated, for all of its stages or for each; None for this one's own.
        observe: called with every timed action; None measures nothing.
    """

    __slots__ = ("_device_name", "_pace", "observe")

    def __init__(
        self,
        device_name: str,
        pace: Pace | Mapping[int, Pace] | None,
        observe: Callable[[TimedAction], None] | None,
    ) -> None:
        self._device_name = device_name
        self._pace = pace
        self.observe = observe

    def ended(self, kind: str, stage: int, microbatch: int, start_s: float) -> None:
        """An action that began at `start_s` ends now."""
        if self.observe is not None:
            stop_s = time.perf_counter()
            self.observe(TimedAction(self._device_name, stage, kind, microbatch, start_s, stop_s))

    def computed(self, kind: ActionKind, stage: int, microbatch: int, start_s: float) -> None:
        """A computation that began at `start_s` ends now, or as late as its pace says."""
        pace = self._pace.get(stage) if isinstance(self._pace, Mapping) else self._pace
        if pace is not None:
            wanted_s = {ActionKind.FORWARD: pace.forward_s, ActionKind.BACKWARD: pace.backward_s}
            rest_s = start_s + wanted_s.get(kind, pace.backward_s / 2) - time.perf_counter()
            if rest_s > 0:
                time.sleep(rest_s)
        if self.observe is not None:
            name = "forward" if kind is ActionKind.FORWARD else "backward"
            self.ended(name, stage, microbatch, start_s)
