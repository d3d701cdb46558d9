"""Pipeline schedules as data: in which order each stage runs its forwards and backwards.

A schedule is a pure function from (stages, micro-batches) to one list of actions a stage. The planner's
event simulator charges those lists with predicted times; the pipeline runtime executes them. Sends and
receives are not listed: they follow from the order, since a stage's forward needs its predecessor's
output and its backward needs its successor's gradient.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

from pydantic import Field

from fedmp.component import Component

__all__ = [
    "Action",
    "ActionKind",
    "GPipe",
    "OneFOneB",
    "Schedule",
    "check_actions",
    "peak_in_flight",
    "schedule_by_name",
]


class ActionKind(Enum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"


class Action(NamedTuple):
    """One unit of a stage's work: the forward or the backward of one micro-batch."""

    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}"


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


class GPipe(Component):
    """All forwards, then all backwards (Huang et al., 2019, GPipe, section 2.3).

    Keeps the activations of every micro-batch; its step time has a closed form.
    """

    @property
    def name(self) -> str:
        """`gpipe`."""
        return "gpipe"

    def actions(self, num_stages: int, num_microbatches: int) -> list[list[Action]]:
        """Backwards run in the order of the forwards, on every stage alike."""
        _check_sizes(num_stages, num_microbatches)
        forwards = [Action(ActionKind.FORWARD, index) for index in range(num_microbatches)]
        backwards = [Action(ActionKind.BACKWARD, index) for index in range(num_microbatches)]
        return [forwards + backwards for _ in range(num_stages)]


class OneFOneB(Component):
    """One forward, one backward (Narayanan et al., 2019, PipeDream, section 3.2; flushed every step).

    Stage s of P runs its warm-up forwards, then alternates, then drains. `P - s` warm-up forwards keep
    the fewest activations; where links are slow, `2(P - s) - 1` hides a transfer behind a computation.

    Args:
        warmup: "short" for P - s warm-up forwards, "long" for 2(P - s) - 1.
    """

    warmup: str = Field(default="long", pattern="^(short|long)$")

    @property
    def name(self) -> str:
        """`1f1b`, or `1f1b-short`."""
        return "1f1b" if self.warmup == "long" else "1f1b-short"

    def warmup_depth(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        """Forwards that `stage` runs before its first backward: the activations it holds at most."""
        behind = num_stages - stage
        return min(num_microbatches, behind if self.warmup == "short" else 2 * behind - 1)

    def actions(self, num_stages: int, num_microbatches: int) -> list[list[Action]]:
        """Backwards run in the order of the forwards."""
        _check_sizes(num_stages, num_microbatches)
        return [
            _alternate(self.warmup_depth(stage, num_stages, num_microbatches), num_microbatches)
            for stage in range(num_stages)
        ]


def schedule_by_name(name: str) -> GPipe | OneFOneB:
    """The built-in schedule that a plan or a config names.

    Args:
        name: "gpipe", "1f1b" or "1f1b-short".

    Returns:
        The schedule whose `name` this is.

    Raises:
        ValueError: no built-in schedule has that name.
    """
    built_in: tuple[GPipe | OneFOneB, ...] = (GPipe(), OneFOneB(), OneFOneB(warmup="short"))
    for schedule in built_in:
        if schedule.name == name:
            return schedule
    names = ", ".join(repr(schedule.name) for schedule in built_in)
    raise ValueError(f"unknown schedule {name!r}; use one of {names}")


def peak_in_flight(actions: list[Action]) -> int:
    """The most micro-batches whose activations a stage holds at once under `actions`."""
    alive = peak = 0
    for action in actions:
        alive += 1 if action.kind is ActionKind.FORWARD else -1
        peak = max(peak, alive)
    return peak


def check_actions(actions: list[list[Action]], num_microbatches: int) -> None:
    """Prove that a schedule is complete and cannot deadlock.

    Args:
        actions: one list a stage, as `Schedule.actions` returns it.
        num_microbatches: micro-batches that each stage must process.

    Raises:
        ValueError: a stage misses, repeats or invents an action; or the stages wait for each other.
    """
    wanted = {Action(kind, index) for kind in ActionKind for index in range(num_microbatches)}
    for stage, listed in enumerate(actions):
        if len(listed) != len(set(listed)) or set(listed) != wanted:
            odd = sorted({str(a) for a in listed if listed.count(a) > 1 or a not in wanted})
            missing = sorted(str(a) for a in wanted - set(listed))
            raise ValueError(
                f"stage {stage} must run the forward and the backward of each of {num_microbatches} "
                f"micro-batches once; missing {missing or 'none'}, repeated or unknown {odd or 'none'}"
            )
    done: set[tuple[int, Action]] = set()
    position = [0] * len(actions)
    progressed = True
    while progressed:
        progressed = False
        for stage, listed in enumerate(actions):
            while position[stage] < len(listed) and _is_ready(stage, listed[position[stage]], done, len(actions)):
                done.add((stage, listed[position[stage]]))
                position[stage] += 1
                progressed = True
    stuck = [f"stage {s} at {actions[s][p]}" for s, p in enumerate(position) if p < len(actions[s])]
    if stuck:
        raise ValueError(f"the schedule deadlocks: {', '.join(stuck)} wait for each other")


def _is_ready(stage: int, action: Action, done: set[tuple[int, Action]], num_stages: int) -> bool:
    if action.kind is ActionKind.FORWARD:
        return stage == 0 or (stage - 1, action) in done
    own_forward = (stage, Action(ActionKind.FORWARD, action.microbatch)) in done
    return own_forward and (stage == num_stages - 1 or (stage + 1, action) in done)


def _alternate(depth: int, num_microbatches: int) -> list[Action]:
    actions = [Action(ActionKind.FORWARD, index) for index in range(depth)]
    for index in range(num_microbatches):
        actions.append(Action(ActionKind.BACKWARD, index))
        if depth + index < num_microbatches:
            actions.append(Action(ActionKind.FORWARD, depth + index))
    return actions


def _check_sizes(num_stages: int, num_microbatches: int) -> None:
    if num_stages < 1 or num_microbatches < 1:
        raise ValueError(
            f"a schedule needs at least one stage and one micro-batch, not {num_stages} and {num_microbatches}"
        )
