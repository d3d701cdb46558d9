"""What schedules are made of: actions, the two seams, and what follows from a list of actions."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

__all__ = [
    "Action",
    "ActionKind",
    "PlacedAction",
    "PlacedSchedule",
    "Schedule",
    "check_sizes",
    "is_ready",
    "peak_in_flight",
]


class ActionKind(Enum):
    """What an action computes.

    A backward comes whole, or split into the gradient of the inputs, which the stage before waits for,
    and the gradient of the weights, which nobody waits for.
    """

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


class Action(NamedTuple):
    """One unit of a stage's work: the forward or the backward of one micro-batch."""

    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}"


class PlacedAction(NamedTuple):
    """One unit of a device's work, where a device runs several stages."""

    kind: ActionKind
    microbatch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}@{self.stage}"


@runtime_checkable
class Schedule(Protocol):
    """The order of a pipeline step's work."""

    @property
    def name(self) -> str:
        """Short name, as plans and reports show it."""
        ...

    def actions(self, num_stages: int, num_microbatches: int) -> list[list[Action]]:
        """One list of actions a stage, in the order in which the stage runs them."""
        ...


@runtime_checkable
class PlacedSchedule(Protocol):
    """The order of a pipeline step's work where a device runs several stages."""

    @property
    def name(self) -> str:
        """Short name, as plans and reports show it."""
        ...

    def placement(self, num_devices: int) -> tuple[tuple[int, ...], ...]:
        """The stages of each device, in ascending order."""
        ...

    def placed_actions(self, num_devices: int, num_microbatches: int) -> list[list[PlacedAction]]:
        """One list of actions a device, in the order in which the device runs them."""
        ...


def peak_in_flight(actions: Sequence[Action] | Sequence[PlacedAction]) -> int:
    """The most activations that a stage, or a device, holds at once under `actions`.

    A split backward holds them until the gradient of the weights.
    """
    alive = peak = 0
    for action in actions:
        if action.kind is ActionKind.FORWARD:
            alive += 1
            peak = max(peak, alive)
        elif action.kind is not ActionKind.BACKWARD_INPUT:
            alive -= 1
    return peak


def is_ready(action: PlacedAction, done: set[PlacedAction], num_stages: int) -> bool:
    """Whether everything that an action needs has been done, on whatever device."""
    kind, microbatch, stage = action
    if kind is ActionKind.FORWARD:
        return stage == 0 or PlacedAction(kind, microbatch, stage - 1) in done
    if kind is ActionKind.BACKWARD_WEIGHT:
        return PlacedAction(ActionKind.BACKWARD_INPUT, microbatch, stage) in done
    if PlacedAction(ActionKind.FORWARD, microbatch, stage) not in done:
        return False
    return stage == num_stages - 1 or any(
        PlacedAction(behind, microbatch, stage + 1) in done
        for behind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)
    )


def check_sizes(num_stages: int, num_microbatches: int) -> None:
    """Refuse numbers of which no schedule can be made.

    Raises:
        ValueError: one of them is less than 1.
    """
    if num_stages < 1 or num_microbatches < 1:
        raise ValueError(
            f"a schedule needs at least one stage and one micro-batch, not {num_stages} and {num_microbatches}"
        )
