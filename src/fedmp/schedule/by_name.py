"""The built-in schedules by the names that plans and configs give them."""

from __future__ import annotations

import re

from fedmp.schedule.actions import PlacedSchedule, Schedule
from fedmp.schedule.gpipe import GPipe
from fedmp.schedule.one_f_one_b import OneFOneB
from fedmp.schedule.placed import Interleaved, VShape
from fedmp.schedule.zero_bubble import ZeroBubble

__all__ = ["placed_schedule_by_name", "schedule_by_name"]

_BUILT_IN: tuple[Schedule, ...] = (GPipe(), OneFOneB(), OneFOneB(warmup="short"), ZeroBubble())
_PLACED: tuple[PlacedSchedule, ...] = (Interleaved(), VShape(), VShape(splits_backward=False))


def schedule_by_name(name: str) -> Schedule:
    """The built-in schedule that a plan or a config names, of those with one stage a device.

    Args:
        name: "gpipe", "1f1b", "1f1b-short" or "zero-bubble".

    Returns:
        The schedule whose `name` this is.

    Raises:
        ValueError: no built-in schedule has that name.
    """
    for schedule in _BUILT_IN:
        if schedule.name == name:
            return schedule
    if placed_schedule_by_name(name) is not None:
        raise ValueError(f"schedule {name!r} gives a device several stages, which cannot be done here")
    known = [schedule.name for schedule in _BUILT_IN] + [schedule.name for schedule in _PLACED]
    names = ", ".join(map(repr, known))
    raise ValueError(f"unknown schedule {name!r}; use one of {names}")


def placed_schedule_by_name(name: str) -> PlacedSchedule | None:
    """The built-in schedule of that name, if it is one that gives a device several stages.

    Args:
        name: "interleaved" (two stages a device), "interleaved-3" (three), ..., "v-shape", or
            "v-shape-whole" (without split backwards); any other name gives None.
    """
    stages = re.fullmatch(r"interleaved-([1-9]\d*)", name)
    if stages and int(stages[1]) > 2:
        return Interleaved(stages_per_device=int(stages[1]))
    return next((schedule for schedule in _PLACED if schedule.name == name), None)
