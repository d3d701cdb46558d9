"""The event simulator: how long one step of a schedule takes, given what each action and transfer takes.

Every stage runs its actions in the order its schedule lists them. A message leaves as soon as it is
produced and its link is free; a link carries one message at a time in each direction; sending does not
hold up the sender. That makes the order of all events a fixed graph without cycles, whatever the times,
so the graph is walked once, and times may be arrays: many plans of equally many stages in one go.

A split backward's halves, the gradient of the inputs and that of the weights, are charged half of the backward
each: a matrix product has one product for either, as large as its forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from fedmp.partition.estimate import Array
from fedmp.schedule import Action, ActionKind, Schedule, schedule_by_name

__all__ = ["SHARE_OF_HALF", "StageTimes", "Timeline", "gpipe_step_s", "simulate", "step_s", "timeline"]

T = TypeVar("T", float, Array)

SHARE_OF_HALF = 0.5  # of a whole backward, for either half of a split one


@dataclass(frozen=True)
class StageTimes(Generic[T]):
    """Seconds of one micro-batch, by stage; floats, or arrays with one entry a plan.

    Args:
        forward_s, backward_s: of each of P stages.
        send_s, gradient_s: over each of the P - 1 boundaries, forward and back.
    """

    forward_s: Sequence[T]
    backward_s: Sequence[T]
    send_s: Sequence[T]
    gradient_s: Sequence[T]

    @property
    def num_stages(self) -> int:
        """Stages of the plan, or of each of the plans."""
        return len(self.forward_s)


class TimedEvent(NamedTuple):
    """One action of a simulated step, in seconds since the step began."""

    action: Action
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class Timeline:
    """One simulated step.

    Attributes:
        step_s: seconds from the first action's start to the last one's end.
        stages: each stage's actions in the order they ran.
    """

    step_s: float
    stages: tuple[tuple[TimedEvent, ...], ...]


def step_s(times: StageTimes[T], schedule: str, num_microbatches: int) -> T:
    """Seconds of one step under a built-in schedule.

    Args:
        times: of one plan (floats) or of many (arrays).
        schedule: "gpipe" (by its closed form), "1f1b", "1f1b-short" or "zero-bubble" (simulated).
        num_microbatches: micro-batches of the step.

    Returns:
        A float, or an array with one entry a plan.
    """
    if schedule == "gpipe":
        return gpipe_step_s(times, num_microbatches)
    return _run(times, _built_in_order(schedule, times.num_stages, num_microbatches), num_microbatches)


def simulate(times: StageTimes[T], actions: Sequence[Sequence[Action]]) -> T:
    """Seconds of one step under any schedule.

    Args:
        times: of one plan (floats) or of many (arrays).
        actions: one list a stage, as `Schedule.actions` returns them.

    Raises:
        ValueError: the schedule deadlocks.
    """
    return _run(times, _order(actions), _num_microbatches(actions))


def timeline(times: StageTimes[float], schedule: Schedule, num_microbatches: int) -> Timeline:
    """When each action of one step starts and stops, for a picture of the pipeline.

    Raises:
        ValueError: the schedule deadlocks.
    """
    order = _order(schedule.actions(times.num_stages, num_microbatches))
    stops: list[float] = []
    seconds = _run(times, order, num_microbatches, stops)
    stages: list[list[TimedEvent]] = [[] for _ in range(times.num_stages)]
    for (stage, kind, microbatch), stop in zip(order, stops, strict=True):
        took = (
            times.forward_s[stage] if kind is ActionKind.FORWARD else _share(kind) * times.backward_s[stage]
        )
        stages[stage].append(TimedEvent(Action(kind, microbatch), stop - took, stop))
    return Timeline(step_s=seconds, stages=tuple(map(tuple, stages)))


def gpipe_step_s(times: StageTimes[T], num_microbatches: int) -> T:
    """GPipe's step time in closed form, for unequal stages and links (DESIGN.md section 7).

    `T = Σ(f+b) + Σ(cf+cb) + (M-1)·[max(f,cf) + max(b,cb)]`: the first micro-batch crosses everything
    once each way, and the others follow at the pace of the slowest stage or link of their direction.
    Huang et al. (2019) give the case of equal stages without links.
    """
    maximum = _maximum_of(times)
    forward: list[Any] = [*times.forward_s, *times.send_s]
    backward: list[Any] = [*times.backward_s, *times.gradient_s]
    slowest_forward, slowest_backward = forward[0], backward[0]
    for value in forward[1:]:
        slowest_forward = maximum(slowest_forward, value)
    for value in backward[1:]:
        slowest_backward = maximum(slowest_backward, value)
    step: T = sum(forward) + sum(backward) + (num_microbatches - 1) * (slowest_forward + slowest_backward)
    return step


class _Step(NamedTuple):
    stage: int
    kind: ActionKind
    microbatch: int


def _run(
    times: StageTimes[T], order: Sequence[_Step], num_microbatches: int, stops: list[T] | None = None
) -> T:
    """Walk the events in an order in which everything an event needs comes before it."""
    maximum, zero = _maximum_of(times), times.forward_s[0] * 0.0
    last = times.num_stages - 1
    forward_s, backward_s, send_s, gradient_s = (
        times.forward_s,
        times.backward_s,
        times.send_s,
        times.gradient_s,
    )
    free = [zero] * (last + 1)
    sending, returning = [zero] * (last + 1), [zero] * (last + 1)
    inputs = [[zero] * num_microbatches for _ in range(last + 1)]
    gradients = [[zero] * num_microbatches for _ in range(last + 1)]
    for stage, kind, microbatch in order:
        if kind is ActionKind.FORWARD:
            stop = maximum(free[stage], inputs[stage][microbatch]) + forward_s[stage]
            if stage < last:
                sending[stage] = maximum(sending[stage], stop) + send_s[stage]
                inputs[stage + 1][microbatch] = sending[stage]
        elif kind is ActionKind.BACKWARD_WEIGHT:
            stop = free[stage] + SHARE_OF_HALF * backward_s[stage]
        else:
            stop = maximum(free[stage], gradients[stage][microbatch]) + _share(kind) * backward_s[stage]
            if stage > 0:
                returning[stage] = maximum(returning[stage], stop) + gradient_s[stage - 1]
                gradients[stage - 1][microbatch] = returning[stage]
        free[stage] = stop
        if stops is not None:
            stops.append(stop)
    latest = free[0]
    for stop in free[1:]:
        latest = maximum(latest, stop)
    return latest


@lru_cache(maxsize=256)
def _built_in_order(schedule: str, num_stages: int, num_microbatches: int) -> tuple[_Step, ...]:
    return tuple(_order(schedule_by_name(schedule).actions(num_stages, num_microbatches)))


def _order(actions: Sequence[Sequence[Action]]) -> list[_Step]:
    """All actions, each after those that it waits for."""
    last, position = len(actions) - 1, [0] * len(actions)
    done: set[tuple[int, bool, int]] = set()  # stage, whether forward, micro-batch; of what others wait for
    order: list[_Step] = []
    waiting = list(range(len(actions)))
    while waiting:
        stage = waiting.pop()
        for kind, microbatch in actions[stage][position[stage] :]:
            needed = _needed(stage, kind, microbatch, last)
            if needed is not None and needed not in done:
                break
            position[stage] += 1
            order.append(_Step(stage, kind, microbatch))
            if kind is ActionKind.BACKWARD_WEIGHT:
                continue
            is_forward = kind is ActionKind.FORWARD
            done.add((stage, is_forward, microbatch))
            neighbour = stage + 1 if is_forward else stage - 1
            if 0 <= neighbour <= last and neighbour not in waiting:
                waiting.append(neighbour)
    if any(at < len(listed) for at, listed in zip(position, actions, strict=True)):
        raise ValueError(
            "the schedule deadlocks: its stages wait for each other; check it with check_actions"
        )
    return order


def _needed(stage: int, kind: ActionKind, microbatch: int, last: int) -> tuple[int, bool, int] | None:
    if kind is ActionKind.BACKWARD_WEIGHT:
        return None  # but for its other half, which is before it in its stage's own list
    if kind is ActionKind.FORWARD:
        return (stage - 1, True, microbatch) if stage > 0 else None
    return (stage + 1, False, microbatch) if stage < last else (stage, True, microbatch)


def _share(kind: ActionKind) -> float:
    return 1.0 if kind is ActionKind.BACKWARD else SHARE_OF_HALF


def _num_microbatches(actions: Sequence[Sequence[Action]]) -> int:
    return 1 + max(action.microbatch for listed in actions for action in listed)


def _maximum_of(times: StageTimes[T]) -> Any:
    return np.maximum if isinstance(times.forward_s[0], np.ndarray) else max
