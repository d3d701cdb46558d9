"""Schedules that give a device several stages: their event simulator and their plans."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ByteSize

from fedmp.errors import InfeasibleError, PlanError
from fedmp.partition import Balanced, Exact, StageTimes, Uniform, build_plan, cost_model, simulate
from fedmp.partition.placed_events import place, simulate_placed
from fedmp.records import Plan
from fedmp.schedule import ActionKind, OneFOneB, PlacedAction, peak_in_flight, placed_schedule_by_name
from fedmp.topology import Device, Link, Links
from tests.partition.instances import Instance, random_instance
from tests.partition.test_events import random_times

F, B, OF_INPUT, W = ActionKind
NAMES = ("interleaved", "interleaved-3", "v-shape", "v-shape-whole")


def relaxed(
    times: StageTimes[float], actions: list[list[PlacedAction]], placement: list[tuple[int, ...]]
) -> float:
    """The step by raising every action's stop until nothing rises: no order of events is assumed."""
    device_of = {stage: device for device, own in enumerate(placement) for stage in own}
    last = times.num_stages - 1
    stop = {action: 0.0 for listed in actions for action in listed}
    arrival: dict[PlacedAction, float] = {}
    while True:
        before = dict(stop)
        for device, listed in enumerate(actions):
            free, links = 0.0, dict.fromkeys(range(len(actions)), 0.0)
            for action in listed:
                kind, microbatch, stage = action
                half = 0.5 if kind in (OF_INPUT, W) else 1.0
                took = times.forward_s[stage] if kind is F else half * times.backward_s[stage]
                free = stop[action] = max(free, arrival.get(action, 0.0)) + took
                if kind is W or (kind is F and stage == last) or (kind is not F and stage == 0):
                    continue
                after = stage + 1 if kind is F else stage - 1
                peer = device_of[after]
                if peer == device:
                    came = free
                else:
                    link = times.send_s[stage] if kind is F else times.gradient_s[stage - 1]
                    came = links[peer] = max(links[peer], free) + link
                for wakes in (F,) if kind is F else (B, OF_INPUT):
                    arrival[PlacedAction(wakes, microbatch, after)] = came
        if stop == before:
            return max(stop.values())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_devices=st.integers(1, 4),
    num_microbatches=st.integers(1, 7),
    name=st.sampled_from(NAMES),
)
def test_the_simulator_agrees_with_a_relaxation(
    seed: int, num_devices: int, num_microbatches: int, name: str
) -> None:
    placed = place(name, num_devices, num_microbatches)
    times = random_times(random.Random(seed), len(placed.device_of))
    expected = relaxed(times, [list(a) for a in placed.actions], list(placed.placement))
    assert simulate_placed(times, placed.actions, placed.placement) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_with_one_stage_a_device_it_is_the_other_simulator(seed: int) -> None:
    rng = random.Random(seed)
    count, num_microbatches = rng.randint(1, 5), rng.randint(1, 8)
    times, plain = random_times(rng, count), OneFOneB().actions(count, num_microbatches)
    lists = [[PlacedAction(*action, stage) for action in listed] for stage, listed in enumerate(plain)]
    found = simulate_placed(times, lists, [(stage,) for stage in range(count)])
    assert found == pytest.approx(simulate(times, plain), rel=1e-12)


def test_a_step_by_hand() -> None:
    """Stages 0 and 2 on one device, stage 1 on another; 2 to 1 and 1 to 0 share the ways with 0 to 1 to 2."""
    times = StageTimes([1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [0.5, 0.5], [0.25, 0.25])
    first = [PlacedAction(F, 0, 0), PlacedAction(F, 0, 2), PlacedAction(B, 0, 2), PlacedAction(B, 0, 0)]
    second = [PlacedAction(F, 0, 1), PlacedAction(OF_INPUT, 0, 1), PlacedAction(W, 0, 1)]
    # F0@0 until 1, there at 1.5, F0@1 until 3.5, back at 4, F0@2 until 5, B0@2 until 7, there at 7.25,
    # I0@1 until 9.25, back at 9.5 while W0@1 runs until 11.25; B0@0 until 11.5
    assert simulate_placed(times, [first, second], [(0, 2), (1,)]) == 11.5


def test_messages_of_two_stages_share_a_link() -> None:
    times = StageTimes([1.0, 0.0, 1.0, 0.0], [0.0] * 4, [5.0, 0.0, 5.0], [0.0] * 3)
    kinds = [(F, 0, 0), (F, 0, 2), (F, 1, 0), (F, 1, 2)]
    backwards = [(B, index, stage) for index in (0, 1) for stage in (2, 0)]
    first = [PlacedAction(*action) for action in (*kinds, *backwards)]
    second = [
        PlacedAction(*action)
        for action in [(F, 0, 1), (F, 0, 3), (F, 1, 1), (F, 1, 3), (B, 0, 3), (B, 0, 1), (B, 1, 3), (B, 1, 1)]
    ]
    # four messages of 5 s one after another: leaving at 1, 7 (once the first has come back), 8 and 14 at best
    assert simulate_placed(times, [first, second], [(0, 2), (1, 3)]) == relaxed(
        times, [first, second], [(0, 2), (1, 3)]
    )
    assert simulate_placed(times, [first, second], [(0, 2), (1, 3)]) > 4 * 5.0


@pytest.mark.parametrize("name", NAMES)
def test_many_plans_at_once_give_the_same_as_one_by_one(name: str) -> None:
    placed = place(name, 3, 5)
    many = [random_times(random.Random(seed), len(placed.device_of)) for seed in range(8)]
    stacked = StageTimes(
        *(
            [np.array(column) for column in zip(*(getattr(t, field) for t in many), strict=True)]
            for field in ("forward_s", "backward_s", "send_s", "gradient_s")
        )
    )
    alone = [simulate_placed(times, placed.actions, placed.placement) for times in many]
    np.testing.assert_array_equal(simulate_placed(stacked, placed.actions, placed.placement), alone)


def test_a_deadlock_is_an_error() -> None:
    times = StageTimes([1.0, 1.0], [1.0, 1.0], [0.0], [0.0])
    first = [PlacedAction(B, 0, 0), PlacedAction(F, 0, 0)]
    second = [PlacedAction(F, 0, 1), PlacedAction(B, 0, 1)]
    with pytest.raises(ValueError, match="deadlocks"):
        simulate_placed(times, [first, second], [(0,), (1,)])


def brute_force(instance: Instance, name: str) -> Plan | None:
    """Every order of every choice of devices, with every choice of cuts."""
    positions = cost_model(instance.profile, instance.num_microbatches).positions()[1:-1]
    best: Plan | None = None
    for count in range(1, len(instance.devices) + 1):
        on = place(name, count, instance.num_microbatches).device_of
        for order in itertools.permutations(instance.devices, count):
            for cuts in itertools.combinations(positions, len(on) - 1):
                try:
                    plan = build_plan(
                        instance.profile,
                        [order[device] for device in on],
                        cuts,
                        instance.links,
                        num_microbatches=instance.num_microbatches,
                        schedule=name,
                    )
                except InfeasibleError:
                    continue
                best = plan if best is None or plan.step_s < best.step_s else best
    return best


@pytest.mark.parametrize("seed", range(14))
def test_exact_finds_the_best_of_small_problems_and_says_so(seed: int) -> None:
    name = NAMES[seed % 4]
    instance = random_instance(seed, num_layers=(4, 8), num_devices=(1, 3))
    expected = brute_force(instance, name)
    arguments = (instance.profile, instance.devices, instance.links)
    if expected is None:
        with pytest.raises(PlanError):
            Exact(schedule=name).plan(*arguments, num_microbatches=instance.num_microbatches)
        return
    plan = Exact(schedule=name).plan(*arguments, num_microbatches=instance.num_microbatches)
    assert plan.step_s == pytest.approx(expected.step_s, rel=1e-12)
    assert plan.gap == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("partitioner", [Balanced, Exact])
def test_a_large_problem_is_planned_better_than_evenly_and_above_its_bound(
    partitioner: type[Balanced] | type[Exact], name: str
) -> None:
    instance = random_instance(4, num_layers=(60, 60), num_devices=(4, 4), can_bind=False, spread=4.0)
    arguments = (instance.profile, instance.devices, instance.links)
    plan = partitioner(schedule=name).plan(*arguments, num_microbatches=8)
    even = Uniform(schedule=name).plan(*arguments, num_microbatches=8)
    assert 0 < plan.bound_s <= plan.step_s <= even.step_s
    assert plan.placement == placed_schedule_by_name(name).placement(plan.num_devices)  # type: ignore[union-attr]


def test_a_plan_knows_its_placement_also_after_json() -> None:
    instance = random_instance(2, num_layers=(8, 8), num_devices=(3, 3), can_bind=False)
    plan = Uniform(schedule="v-shape").plan(
        instance.profile, instance.devices[:3], instance.links, num_microbatches=4
    )
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.placement == ((0, 5), (1, 4), (2, 3))
    assert (again.num_stages, again.num_devices) == (6, 3)
    assert again.devices == tuple(device.name for device in instance.devices[:3])
    assert again.stages[2].send_s == again.stages[2].gradient_s == 0.0, "stages 2 and 3 are on one device"
    lists = place("v-shape", 3, 4).actions
    assert [stage.in_flight for stage in again.stages] == [
        peak_in_flight([a for listed in lists for a in listed if a.stage == stage]) for stage in range(6)
    ]


def test_the_memory_of_a_device_is_that_of_all_its_stages() -> None:
    instance = random_instance(2, num_layers=(8, 8), num_devices=(2, 2), can_bind=False)
    roomy = Uniform(schedule="interleaved").plan(
        instance.profile, instance.devices, instance.links, num_microbatches=4
    )
    needed = [sum(roomy.stages[stage].memory_bytes for stage in own) for own in roomy.placement]

    def plan(memory_bytes: int) -> Plan:
        first = instance.devices[0]
        tight = Device(first.name, first.flops_per_s, ByteSize(memory_bytes))
        return Uniform(schedule="interleaved").plan(
            instance.profile, [tight, instance.devices[1]], instance.links, num_microbatches=4
        )

    assert plan(needed[0]).placement == roomy.placement
    with pytest.raises(InfeasibleError, match=r"stages 0, 2 need .* but device .* has"):
        plan(needed[0] - 1)


def test_what_does_not_fit_is_refused_with_ways_out() -> None:
    instance = random_instance(2, num_layers=(8, 8), num_devices=(2, 2), can_bind=False)
    tiny = [Device(name, 1e11, ByteSize(1000)) for name in "ab"]
    for partitioner in (Balanced(schedule="v-shape"), Exact(schedule="v-shape")):
        with pytest.raises(InfeasibleError, match=r"'v-shape'; it would with .* more on device '[ab]', or"):
            partitioner.plan(instance.profile, tiny, Links(), num_microbatches=4)


def test_devices_must_be_placed_as_the_schedule_says() -> None:
    instance = random_instance(2, num_layers=(8, 8), num_devices=(2, 2), can_bind=False)
    a, b = instance.devices
    for wrong in ([a, b, b, a], [a, b], []):
        with pytest.raises(PlanError, match="schedule 'interleaved' places its stages on"):
            build_plan(
                instance.profile,
                wrong,
                range(1, max(len(wrong), 1)),
                instance.links,
                num_microbatches=4,
                schedule="interleaved",
            )


def test_slow_links_cost_interleaving_more_than_one_stage_a_device() -> None:
    """Twice the boundaries: where links take as long as stages, plain 1F1B is predicted to win."""
    instance = random_instance(2, num_layers=(8, 8), num_devices=(2, 2), can_bind=False, spread=1.0)
    slow, fast = Links(default=Link(1e5, 1e-2)), Links(default=Link(1e12, 0.0))
    steps = {
        (kind, name): Uniform(schedule=name)
        .plan(instance.profile, instance.devices, links, num_microbatches=2)
        .step_s
        for kind, links in (("slow", slow), ("fast", fast))
        for name in ("1f1b", "interleaved")
    }
    assert steps["slow", "interleaved"] > steps["slow", "1f1b"]
