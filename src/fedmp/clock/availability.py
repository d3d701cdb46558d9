"""When clients can take part: always, in certain hours of the day, or as a trace of real devices says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from pydantic import Field, model_validator

from fedmp.component import Component
from fedmp.errors import ConfigError
from fedmp.seeds import derive_seed

__all__ = ["Always", "Availability", "Hours", "Trace", "Window"]

_HOUR_S, _DAY_S = 3600.0, 86_400.0


class Window(NamedTuple):
    """A stretch of simulated time in which a client can work, in seconds since the run began."""

    start_s: float
    stop_s: float


@runtime_checkable
class Availability(Protocol):
    """When each client can work."""

    def window(self, client: str, time_s: float, *, seed: int) -> Window | None:
        """The first window that ends after a moment; None if there is none any more."""
        ...


class Always(Component):
    """Every client, all the time."""

    def window(self, client: str, time_s: float, *, seed: int) -> Window | None:
        """All of time."""
        return Window(-math.inf, math.inf)


class Hours(Component):
    """Some hours of each day, such as a night on the charger.

    Args:
        start_h, stop_h: hours of the day, 0 to 24; a stop before the start is on the next day.
        spread_h: each client's day begins up to so many hours later, as in other time zones; drawn by the seed.
        run_starts_h: the hour at which the run begins.
    """

    start_h: float = Field(default=22.0, ge=0, le=24)
    stop_h: float = Field(default=6.0, ge=0, le=24)
    spread_h: float = Field(default=0.0, ge=0, le=24)
    run_starts_h: float = Field(default=0.0, ge=0, le=24)

    @model_validator(mode="after")
    def _is_some_time(self) -> Hours:
        if self.start_h == self.stop_h:
            raise ValueError(f"the hours from {self.start_h:g} to {self.stop_h:g} are none; let them differ")
        return self

    def window(self, client: str, time_s: float, *, seed: int) -> Window | None:
        """This day's hours, or the next day's if they are over."""
        late_h = 0.0
        if self.spread_h:
            draw = np.random.default_rng(derive_seed(seed, "hours", client)).random()
            late_h = float(draw) * self.spread_h
        length_s = ((self.stop_h - self.start_h) % 24.0 or 24.0) * _HOUR_S
        first_s = (self.start_h + late_h - self.run_starts_h) * _HOUR_S
        day = math.floor((time_s - first_s - length_s) / _DAY_S) + 1
        return Window(first_s + day * _DAY_S, first_s + day * _DAY_S + length_s)


class Trace(Component):
    """Recorded hours of real devices, from a JSON file `[[[start_s, stop_s], ...], ...]`, one list a device.

    Clients take the file's devices in an order that the seed decides, and again from the first when there are more
    clients.

    Args:
        path: of the file.
        period_s: the trace begins again after so many seconds; None lets it end.
    """

    path: Path
    period_s: float | None = Field(default=None, gt=0)

    @cached_property
    def devices(self) -> tuple[tuple[Window, ...], ...]:
        """The windows of each device in the file.

        Raises:
            ConfigError: the file cannot be read or is no such trace.
        """
        try:
            rows = json.loads(self.path.read_text())
            devices = tuple(tuple(Window(float(start), float(stop)) for start, stop in row) for row in rows)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"availability trace {str(self.path)!r}: {error}; it should hold [[[start_s, stop_s], ...], ...]"
            ) from error
        if not devices or not all(devices):
            raise ConfigError(f"availability trace {str(self.path)!r} has a device without any time")
        for row in devices:
            edges = [edge for window in row for edge in window]
            if any(after <= before for before, after in zip(edges, edges[1:], strict=False)):
                raise ConfigError(
                    f"availability trace {str(self.path)!r}: the times of a device must increase, but are {edges[:6]}"
                )
        return devices

    def window(self, client: str, time_s: float, *, seed: int) -> Window | None:
        """The device's first window that ends after the moment."""
        devices = self.devices
        row = devices[derive_seed(seed, "trace", client) % len(devices)]
        past_s = 0.0
        if self.period_s is not None:
            past_s = math.floor(time_s / self.period_s) * self.period_s
        for window in _shifted(row, past_s):
            if window.stop_s > time_s:
                return window
        return None if self.period_s is None else _shifted(row, past_s + self.period_s)[0]


def _shifted(row: Sequence[Window], by_s: float) -> Sequence[Window]:
    return [Window(start_s + by_s, stop_s + by_s) for start_s, stop_s in row]
