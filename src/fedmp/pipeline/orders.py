"""A schedule as the devices of one pipeline run it: every device's actions, how much each stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedmp.schedule import Action, PlacedAction, PlacedSchedule, Schedule, peak_in_flight

__all__ = ["Order", "order_of"]


@dataclass(frozen=True)
class Order:
    """What to do in a step.

    Attributes:
        actions: of each device.
        peaks: the most micro-batches that each stage holds.
    """

    actions: Sequence[Sequence[PlacedAction]]
    peaks: dict[int, int]


def order_of(
    schedule: Schedule | PlacedSchedule, placement: Sequence[Sequence[int]], num_microbatches: int
) -> Order:
    """Lay a schedule out for a placement.

    Args:
        schedule: any.
        placement: the stages of each device.
        num_microbatches: of the step.

    Raises:
        ValueError: the schedule is for another placement.
    """
    if isinstance(schedule, PlacedSchedule):
        wanted = tuple(map(tuple, schedule.placement(len(placement))))
        if wanted != tuple(map(tuple, placement)):
            raise ValueError(f"schedule {schedule.name} places stages {wanted}, not {placement}")
        actions = schedule.placed_actions(len(placement), num_microbatches)
    else:
        actions = _placed(schedule.actions(sum(map(len, placement)), num_microbatches), placement)
    peaks = {
        stage: peak_in_flight([action for action in listed if action.stage == stage])
        for listed, own in zip(actions, placement, strict=True)
        for stage in own
    }
    return Order(actions, peaks)


def _placed(actions: list[list[Action]], placement: Sequence[Sequence[int]]) -> list[list[PlacedAction]]:
    if any(len(own) != 1 for own in placement):
        raise ValueError("a device with several stages needs a placed schedule, such as Interleaved")
    return [
        [PlacedAction(action.kind, action.microbatch, stage) for action in actions[stage]]
        for (stage,) in placement
    ]
