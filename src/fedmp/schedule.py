"""Pipeline schedules as data: in which order each stage runs its forwards and backwards.

A schedule is a pure function from (stages, micro-batches) to one list of actions a stage. The planner's
event simulator charges those lists with predicted times; the pipeline runtime executes them. Sends and
receives are not listed: they follow from the order, since a stage's forward needs its predecessor's
output and its backward needs its successor's gradient.

Where a device runs several stages, a placed schedule gives one list of placed actions a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

from pydantic import Field

from fedmp.component import Component

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
    "schedule_by_name",
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


class ZeroBubble(Component):
    """1F1B with the backward split, weight gradients filling the bubbles (Qi et al., 2023, Zero Bubble
    Pipeline Parallelism, section 2, ZB-H1).

    Holds no more activations than 1F1B with its short warm-up. We pick actions greedily by the paper's
    priorities with equal times for F, I and W, rather than by its hand-written order.
    """

    @property
    def name(self) -> str:
        """`zero-bubble`."""
        return "zero-bubble"

    def actions(self, num_stages: int, num_microbatches: int) -> list[list[Action]]:
        """Inputs' gradients run in the order of the forwards, and so do weights' gradients."""
        _check_sizes(num_stages, num_microbatches)
        placement = tuple((stage,) for stage in range(num_stages))
        limits = [num_stages - stage for stage in range(num_stages)]
        placed = _greedy(placement, num_microbatches, limits, splits=True)
        return [[Action(action.kind, action.microbatch) for action in listed] for listed in placed]


class Interleaved(Component):
    """Interleaved 1F1B: device d runs stages d, d + P, d + 2P, ... (Narayanan et al., 2021, Efficient
    large-scale language model training, section 2.2).

    The bubble shrinks by `stages_per_device`; messages grow by as much. Unlike the paper's order, any
    number of micro-batches will do.

    Args:
        stages_per_device: 2 or more.
    """

    stages_per_device: int = Field(default=2, ge=2)

    @property
    def name(self) -> str:
        """`interleaved`."""
        return "interleaved"

    def placement(self, num_devices: int) -> tuple[tuple[int, ...], ...]:
        """Stages in turn."""
        num_stages = num_devices * self.stages_per_device
        return tuple(tuple(range(device, num_stages, num_devices)) for device in range(num_devices))

    def placed_actions(self, num_devices: int, num_microbatches: int) -> list[list[PlacedAction]]:
        """Backwards first where one is ready; forwards in groups of as many micro-batches as devices."""
        _check_sizes(num_devices, num_microbatches)
        extra = (self.stages_per_device - 1) * num_devices
        limits = [2 * (num_devices - device - 1) + extra + 1 for device in range(num_devices)]
        return _greedy(self.placement(num_devices), num_microbatches, limits, splits=False)


class VShape(Component):
    """Two stages a device, down the devices and up again, so that the first and the last stage share a
    device and neither inputs nor labels leave it (Qi et al., 2024, Pipeline parallelism with controllable
    memory).

    Args:
        splits_backward: fill bubbles with weight gradients, as the paper does.
    """

    splits_backward: bool = True

    @property
    def name(self) -> str:
        """`v-shape`."""
        return "v-shape"

    def placement(self, num_devices: int) -> tuple[tuple[int, ...], ...]:
        """Device d has stages d and 2P - 1 - d."""
        return tuple((device, 2 * num_devices - 1 - device) for device in range(num_devices))

    def placed_actions(self, num_devices: int, num_microbatches: int) -> list[list[PlacedAction]]:
        """No device holds more than 2P stage activations, as many as 1F1B's first device does."""
        _check_sizes(num_devices, num_microbatches)
        limits = [2 * num_devices] * num_devices
        return _greedy(self.placement(num_devices), num_microbatches, limits, splits=self.splits_backward)


def schedule_by_name(name: str) -> GPipe | OneFOneB | ZeroBubble:
    """The built-in schedule that a plan or a config names, of those with one stage a device.

    Args:
        name: "gpipe", "1f1b", "1f1b-short" or "zero-bubble".

    Returns:
        The schedule whose `name` this is.

    Raises:
        ValueError: no built-in schedule has that name.
    """
    built_in: tuple[GPipe | OneFOneB | ZeroBubble, ...] = (
        GPipe(),
        OneFOneB(),
        OneFOneB(warmup="short"),
        ZeroBubble(),
    )
    for schedule in built_in:
        if schedule.name == name:
            return schedule
    names = ", ".join(repr(schedule.name) for schedule in built_in)
    raise ValueError(f"unknown schedule {name!r}; use one of {names}")


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


def check_actions(actions: list[list[Action]], num_microbatches: int) -> None:
    """Prove that a schedule is complete and cannot deadlock.

    Args:
        actions: one list a stage, as `Schedule.actions` returns it.
        num_microbatches: micro-batches that each stage must process.

    Raises:
        ValueError: a stage misses, repeats or invents an action; or the stages wait for each other.
    """
    placed = [
        [PlacedAction(action.kind, action.microbatch, stage) for action in listed]
        for stage, listed in enumerate(actions)
    ]
    check_placed_actions(placed, tuple((stage,) for stage in range(len(actions))), num_microbatches)


def check_placed_actions(
    actions: Sequence[Sequence[PlacedAction]],
    placement: Sequence[Sequence[int]],
    num_microbatches: int,
) -> list[int]:
    """Prove that a placed schedule is complete and cannot deadlock.

    Args:
        actions: one list a device.
        placement: the stages of each device; together each stage once.
        num_microbatches: micro-batches that each stage must process.

    Returns:
        The most stage activations that each device holds at once.

    Raises:
        ValueError: a stage has no device or two; a device misses, repeats or invents an action; or the
            devices wait for each other.
    """
    stages = sorted(stage for own in placement for stage in own)
    if stages != list(range(len(stages))) or len(placement) != len(actions):
        raise ValueError(
            f"a placement gives each stage one device and each device a list; got stages {stages} on "
            f"{len(placement)} devices and {len(actions)} lists"
        )
    for listed, own in zip(actions, placement, strict=True):
        for stage in own:
            _check_complete([a for a in listed if a.stage == stage], stage, num_microbatches)
        if foreign := sorted({str(action) for action in listed if action.stage not in own}):
            raise ValueError(f"a device with stages {list(own)} cannot run {foreign}")
    _check_progress(actions, len(stages))
    return [peak_in_flight(listed) for listed in actions]


def _check_complete(listed: list[PlacedAction], stage: int, num_microbatches: int) -> None:
    splits = {a.microbatch for a in listed if a.kind is not ActionKind.BACKWARD} - {
        a.microbatch for a in listed if a.kind is ActionKind.BACKWARD
    }
    forward, whole, of_inputs, of_weights = ActionKind
    wanted = {
        PlacedAction(kind, index, stage)
        for index in range(num_microbatches)
        for kind in (
            (forward, of_inputs, of_weights)
            if index in splits and _has_split(listed, index)
            else (forward, whole)
        )
    }
    if len(listed) != len(set(listed)) or set(listed) != wanted:
        odd = sorted({_short(a) for a in listed if listed.count(a) > 1 or a not in wanted})
        missing = sorted(_short(a) for a in wanted - set(listed))
        raise ValueError(
            f"stage {stage} must run the forward and the backward of each of {num_microbatches} "
            f"micro-batches once; missing {missing or 'none'}, repeated or unknown {odd or 'none'}"
        )


def _has_split(listed: list[PlacedAction], microbatch: int) -> bool:
    halves = (ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
    return any(action.microbatch == microbatch and action.kind in halves for action in listed)


def _short(action: PlacedAction) -> str:
    return f"{action.kind.value}{action.microbatch}"


def _check_progress(actions: Sequence[Sequence[PlacedAction]], num_stages: int) -> None:
    done: set[PlacedAction] = set()
    position = [0] * len(actions)
    progressed = True
    while progressed:
        progressed = False
        for device, listed in enumerate(actions):
            while position[device] < len(listed) and _is_ready(listed[position[device]], done, num_stages):
                done.add(listed[position[device]])
                position[device] += 1
                progressed = True
    stuck = [
        f"stage {listed[p].stage} at {_short(listed[p])}"
        for listed, p in zip(actions, position, strict=True)
        if p < len(listed)
    ]
    if stuck:
        raise ValueError(f"the schedule deadlocks: {', '.join(stuck)} wait for each other")


def _is_ready(action: PlacedAction, done: set[PlacedAction], num_stages: int) -> bool:
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


def _greedy(
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
        group = max(len(stages), 1) and max(1, num_microbatches if len(stages) == 1 else _group(stages))
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
            if _is_ready(action, done, num_stages):
                return action
        if self.alive < limit:
            for action in self._forwards:
                if _is_ready(action, done, num_stages):
                    return action
        return self._weights[0] if self._weights else None


def _group(stages: Sequence[int]) -> int:
    """Micro-batches that pass one of a device's stages before the next one gets its turn."""
    return max(1, min(b - a for a, b in zip(stages[:-1], stages[1:], strict=True)))


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
