"""Schedules as data, and the checker that every list of actions must pass."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmp.schedule import (
    Action,
    ActionKind,
    GPipe,
    Interleaved,
    OneFOneB,
    PlacedAction,
    PlacedSchedule,
    Schedule,
    VShape,
    ZeroBubble,
    check_actions,
    check_placed_actions,
    peak_in_flight,
    placed_schedule_by_name,
    schedule_by_name,
)

F, B, OF_INPUT, W = ActionKind
SCHEDULES: list[Schedule] = [GPipe(), OneFOneB(), OneFOneB(warmup="short"), ZeroBubble()]
PLACED: list[PlacedSchedule] = [
    Interleaved(),
    Interleaved(stages_per_device=3),
    VShape(),
    VShape(splits_backward=False),
]
SIZES = [(1, 1), (1, 5), (2, 1), (2, 3), (3, 8), (4, 4), (4, 13), (6, 16)]


def named(schedule: Schedule | PlacedSchedule) -> str:
    return schedule.name


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_a_built_in_schedule_passes_the_checker(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    check_actions(schedule.actions(num_stages, num_microbatches), num_microbatches)
    assert schedule_by_name(schedule.name) == schedule


@pytest.mark.parametrize("schedule", PLACED, ids=named)
@pytest.mark.parametrize(("num_devices", "num_microbatches"), SIZES)
def test_a_placed_schedule_passes_the_checker(
    schedule: PlacedSchedule, num_devices: int, num_microbatches: int
) -> None:
    actions = schedule.placed_actions(num_devices, num_microbatches)
    check_placed_actions(actions, schedule.placement(num_devices), num_microbatches)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_zero_bubble_holds_no_more_than_short_1f1b(num_stages: int, num_microbatches: int) -> None:
    mine = ZeroBubble().actions(num_stages, num_microbatches)
    other = OneFOneB(warmup="short").actions(num_stages, num_microbatches)
    assert [peak_in_flight(a) <= peak_in_flight(b) for a, b in zip(mine, other, strict=True)]


@pytest.mark.parametrize(("num_devices", "num_microbatches"), SIZES)
def test_the_v_shape_holds_at_most_two_activations_a_device(num_devices: int, num_microbatches: int) -> None:
    schedule = VShape()
    actions = schedule.placed_actions(num_devices, num_microbatches)
    peaks = check_placed_actions(actions, schedule.placement(num_devices), num_microbatches)
    assert max(peaks) <= 2 * num_devices


def test_the_v_shape_puts_the_first_and_the_last_stage_on_one_device() -> None:
    assert VShape().placement(3) == ((0, 5), (1, 4), (2, 3))


def test_zero_bubble_and_interleaving_shorten_the_step() -> None:
    def ticks(lists: list[list[PlacedAction]], cost: dict[ActionKind, float]) -> float:
        done: dict[PlacedAction, float] = {}
        free, at = [0.0] * len(lists), [0] * len(lists)
        last = max(action.stage for listed in lists for action in listed)
        while any(p < len(listed) for p, listed in zip(at, lists, strict=True)):
            for device, listed in enumerate(lists):
                if at[device] == len(listed):
                    continue
                action = listed[at[device]]
                needed = {
                    F: [(F, -1)] if action.stage else [],
                    W: [(OF_INPUT, 0)],
                }.get(action.kind, [(action.kind, 1)] if action.stage < last else [(F, 0)])
                wanted = [PlacedAction(k, action.microbatch, action.stage + d) for k, d in needed]
                if all(other in done for other in wanted):
                    start = max([free[device], *(done[other] for other in wanted)])
                    done[action] = free[device] = start + cost[action.kind]
                    at[device] += 1
        return max(free)

    whole = {F: 1.0, B: 2.0, OF_INPUT: 1.0, W: 1.0}
    plain = [
        [PlacedAction(a.kind, a.microbatch, s) for a in listed]
        for s, listed in enumerate(OneFOneB(warmup="short").actions(4, 8))
    ]
    split = [
        [PlacedAction(a.kind, a.microbatch, s) for a in listed]
        for s, listed in enumerate(ZeroBubble().actions(4, 8))
    ]
    halved = {kind: seconds / 2 for kind, seconds in whole.items()}
    assert ticks(plain, whole) == 33.0
    assert ticks(split, whole) < 33.0
    assert ticks(Interleaved().placed_actions(4, 8), halved) < 33.0
    assert ticks(VShape().placed_actions(4, 8), halved) < 33.0


def test_the_checker_names_what_is_missing_and_what_is_repeated() -> None:
    with pytest.raises(ValueError, match=r"stage 0 .* missing \['B1'\], repeated or unknown \['B0'\]"):
        check_actions([[Action(F, 0), Action(F, 1), Action(B, 0), Action(B, 0)]], 2)


def test_the_checker_refuses_a_backward_both_whole_and_split() -> None:
    with pytest.raises(ValueError, match="repeated or unknown"):
        check_actions([[Action(F, 0), Action(B, 0), Action(OF_INPUT, 0), Action(W, 0)]], 1)


def test_the_checker_refuses_half_a_backward() -> None:
    with pytest.raises(ValueError, match=r"missing \['W0'\]"):
        check_actions([[Action(F, 0), Action(OF_INPUT, 0)]], 1)


def test_the_checker_names_the_stages_that_wait_for_each_other() -> None:
    first = [Action(F, 0), Action(B, 0), Action(F, 1), Action(B, 1)]
    second = [Action(F, 0), Action(F, 1), Action(B, 0), Action(B, 1)]
    with pytest.raises(ValueError, match=r"deadlocks: stage 0 at B0, stage 1 at F1"):
        check_actions([first, second], 2)


def test_the_checker_refuses_a_stage_on_two_devices() -> None:
    lists = [[PlacedAction(F, 0, 0), PlacedAction(B, 0, 0)]] * 2
    with pytest.raises(ValueError, match="one device"):
        check_placed_actions(lists, ((0,), (0,)), 1)


def runs_to_the_end(actions: list[list[Action]]) -> bool:
    """Brute force: repeatedly run any stage whose next action has what it needs."""
    done: set[tuple[int, ActionKind, int]] = set()
    at = [0] * len(actions)
    while True:
        moved = False
        for stage, listed in enumerate(actions):
            if at[stage] == len(listed):
                continue
            kind, microbatch = listed[at[stage]]
            needed: list[tuple[int, ActionKind, int]] = []
            if kind is F and stage > 0:
                needed = [(stage - 1, F, microbatch)]
            if kind is B:
                needed = [(stage, F, microbatch)]
                needed += [(stage + 1, B, microbatch)] if stage + 1 < len(actions) else []
            if all(one in done for one in needed):
                done.add((stage, kind, microbatch))
                at[stage] += 1
                moved = True
        if not moved:
            return all(p == len(listed) for p, listed in zip(at, actions, strict=True))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32), st.integers(0, 6))
def test_the_checker_agrees_with_brute_force_on_random_lists(
    num_stages: int, num_microbatches: int, seed: int, swaps: int
) -> None:
    generator = random.Random(seed)
    actions = GPipe().actions(num_stages, num_microbatches)
    for _ in range(swaps):
        listed = generator.choice(actions)
        i, j = generator.randrange(len(listed)), generator.randrange(len(listed))
        listed[i], listed[j] = listed[j], listed[i]
    if runs_to_the_end(actions):
        check_actions(actions, num_microbatches)
    else:
        with pytest.raises(ValueError, match="deadlocks"):
            check_actions(actions, num_microbatches)


def placed_lists_run(actions: list[list[PlacedAction]]) -> bool:
    """Brute force where devices have several stages and backwards may be split."""
    last = max(action.stage for listed in actions for action in listed)
    done: set[PlacedAction] = set()
    at = [0] * len(actions)

    def is_done(kinds: tuple[ActionKind, ...], microbatch: int, stage: int) -> bool:
        return any(PlacedAction(kind, microbatch, stage) in done for kind in kinds)

    while True:
        moved = False
        for device, listed in enumerate(actions):
            if at[device] == len(listed):
                continue
            kind, microbatch, stage = listed[at[device]]
            if kind is F:
                ready = stage == 0 or is_done((F,), microbatch, stage - 1)
            elif kind is W:
                ready = is_done((OF_INPUT,), microbatch, stage)
            else:
                ready = is_done((F,), microbatch, stage)
                ready &= stage == last or is_done((B, OF_INPUT), microbatch, stage + 1)
            if ready:
                done.add(listed[at[device]])
                at[device] += 1
                moved = True
        if not moved:
            return all(p == len(listed) for p, listed in zip(at, actions, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(PLACED), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32), st.integers(0, 5)
)
def test_the_checker_agrees_with_brute_force_on_random_placed_lists(
    schedule: PlacedSchedule, num_devices: int, num_microbatches: int, seed: int, swaps: int
) -> None:
    generator = random.Random(seed)
    actions = schedule.placed_actions(num_devices, num_microbatches)
    placement = schedule.placement(num_devices)
    for _ in range(swaps):
        listed = generator.choice(actions)
        i, j = generator.randrange(len(listed)), generator.randrange(len(listed))
        listed[i], listed[j] = listed[j], listed[i]
    if placed_lists_run(actions):
        peaks = check_placed_actions(actions, placement, num_microbatches)
        alive = [0] * num_devices
        for device, listed in enumerate(actions):
            held: set[tuple[int, int]] = set()
            for kind, microbatch, stage in listed:
                if kind is F:
                    held.add((microbatch, stage))
                elif kind is not OF_INPUT:
                    held.remove((microbatch, stage))
                alive[device] = max(alive[device], len(held))
        assert peaks == alive
    else:
        with pytest.raises(ValueError, match="deadlocks"):
            check_placed_actions(actions, placement, num_microbatches)


def test_a_placed_schedule_has_a_name_that_finds_it() -> None:
    for schedule in PLACED:
        assert placed_schedule_by_name(schedule.name) == schedule
    for name in ("1f1b", "interleaved-2", "interleaved-1", "interleaved-x", ""):
        assert placed_schedule_by_name(name) is None
    with pytest.raises(ValueError, match="several stages"):
        schedule_by_name("v-shape")
    with pytest.raises(ValueError, match=r"unknown schedule 'v'; use one of .*'v-shape'"):
        schedule_by_name("v")
