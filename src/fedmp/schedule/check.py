"""The checker: a proof that a list of actions is complete and cannot deadlock."""

from __future__ import annotations

from collections.abc import Sequence

from fedmp.schedule.actions import Action, ActionKind, PlacedAction, is_ready, peak_in_flight

__all__ = ["check_actions", "check_placed_actions"]


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
            while position[device] < len(listed) and is_ready(listed[position[device]], done, num_stages):
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
