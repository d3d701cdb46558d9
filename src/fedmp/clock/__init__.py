"""The virtual clock: how long the rounds of a federation would take. Plans, links, bytes and a `Clock` of
conditions come in; when each client's update arrives, and what happened when, go out. Pure functions and frozen
values: nothing here looks at this machine's clock or moves a model."""

from __future__ import annotations

from fedmp.clock.availability import Always, Availability, Hours, Trace, Window
from fedmp.clock.conditions import Clock, Loss
from fedmp.clock.sharing import SharedLink, fair_rates
from fedmp.clock.steps import slowed_step_s
from fedmp.clock.timing import ClientTiming, ClientWork, DeviceWork, ideal_round_s, time_clients

__all__ = [
    "Always",
    "Availability",
    "ClientTiming",
    "ClientWork",
    "Clock",
    "DeviceWork",
    "Hours",
    "Loss",
    "SharedLink",
    "Trace",
    "Window",
    "fair_rates",
    "ideal_round_s",
    "slowed_step_s",
    "time_clients",
]
