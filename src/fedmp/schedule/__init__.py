"""Pipeline schedules as data: in which order each stage runs its forwards and backwards.

A schedule is a pure function from (stages, micro-batches) to one list of actions a stage. The planner's
event simulator charges those lists with predicted times; the pipeline runtime executes them. Sends and
receives are not listed: they follow from the order, since a stage's forward needs its predecessor's
output and its backward needs its successor's gradient.

Where a device runs several stages, a placed schedule gives one list of placed actions a device.
"""

from __future__ import annotations

from fedmp.schedule.actions import (
    Action,
    ActionKind,
    PlacedAction,
    PlacedSchedule,
    Schedule,
    peak_in_flight,
)
from fedmp.schedule.by_name import placed_schedule_by_name, schedule_by_name
from fedmp.schedule.check import check_actions, check_placed_actions
from fedmp.schedule.gpipe import GPipe
from fedmp.schedule.one_f_one_b import OneFOneB
from fedmp.schedule.placed import Interleaved, VShape
from fedmp.schedule.zero_bubble import ZeroBubble

__all__ = [
    "Action",
    "ActionKind",
    "GPipe",
    "Interleaved",
    "OneFOneB",
    "PlacedAction",
    "PlacedSchedule",
    "Schedule",
    "VShape",
    "ZeroBubble",
    "check_actions",
    "check_placed_actions",
    "peak_in_flight",
    "placed_schedule_by_name",
    "schedule_by_name",
]
