"""The event simulator against a plainer one, the closed form, and schedules that cannot run."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmp.partition import StageTimes, gpipe_step_s, simulate, step_s, timeline
from fedmp.schedule import Action, ActionKind, GPipe, OneFOneB, ZeroBubble, schedule_by_name
from tests.partition.instances import plain_simulation

SCHEDULES = ("gpipe", "1f1b", "1f1b-short", "zero-bubble")


def random_times(rng: random.Random, num_stages: int) -> StageTimes[float]:
    """Stage and link times over two orders of magnitude; some links take no time."""
    return StageTimes(
        forward_s=[10 ** rng.uniform(-2, 0) for _ in range(num_stages)],
        backward_s=[10 ** rng.uniform(-2, 0) for _ in range(num_stages)],
        send_s=[rng.choice([0.0, 10 ** rng.uniform(-3, 0)]) for _ in range(num_stages - 1)],
        gradient_s=[rng.choice([0.0, 10 ** rng.uniform(-3, 0)]) for _ in range(num_stages - 1)],
    )


def test_gpipe_closed_form_agrees_with_the_simulator_on_300_random_instances() -> None:
    rng = random.Random(0)
    for _ in range(300):
        num_stages, num_microbatches = rng.randint(1, 8), rng.randint(1, 16)
        times = random_times(rng, num_stages)
        simulated = simulate(times, GPipe().actions(num_stages, num_microbatches))
        assert gpipe_step_s(times, num_microbatches) == pytest.approx(simulated, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_stages=st.integers(1, 6),
    num_microbatches=st.integers(1, 9),
    schedule=st.sampled_from(SCHEDULES),
)
def test_simulator_agrees_with_a_plain_one(
    seed: int, num_stages: int, num_microbatches: int, schedule: str
) -> None:
    times = random_times(random.Random(seed), num_stages)
    actions = schedule_by_name(schedule).actions(num_stages, num_microbatches)
    plain = plain_simulation(times.forward_s, times.backward_s, times.send_s, times.gradient_s, actions)
    assert simulate(times, actions) == pytest.approx(plain, rel=1e-12)


def test_a_split_backward_by_hand() -> None:
    times = StageTimes(forward_s=[1.0, 2.0], backward_s=[2.0, 4.0], send_s=[0.5], gradient_s=[0.25])
    # F0 at 0-1, sent by 1.5, F0 on stage 1 until 3.5, I0 until 5.5, back by 5.75, W0 on stage 1 until 7.5
    # while stage 0 runs I0 until 6.75 and W0 until 7.75.
    assert step_s(times, "zero-bubble", 1) == 7.75
    drawn = timeline(times, ZeroBubble(), 1)
    assert [(str(event.action), event.start_s, event.stop_s) for event in drawn.stages[0]] == [
        ("F0", 0.0, 1.0),
        ("I0", 5.75, 6.75),
        ("W0", 6.75, 7.75),
    ]


def test_a_split_backward_saves_time_where_stages_are_equal() -> None:
    times = StageTimes([1.0] * 4, [2.0] * 4, [0.0] * 3, [0.0] * 3)
    # 1F1B idles for (P - 1)(F + B); here each of the P - 1 gradients of inputs comes back a weight gradient earlier
    assert step_s(times, "1f1b-short", 8) == 8 * 3.0 + 3 * 3.0
    assert step_s(times, "zero-bubble", 8) == 8 * 3.0 + 3 * 2.0


def test_a_step_by_hand() -> None:
    times = StageTimes(forward_s=[1.0, 2.0], backward_s=[2.0, 4.0], send_s=[0.5], gradient_s=[0.25])
    # F0 at 0-1, sent by 1.5, F0 B0 on stage 1 until 3.5 and 7.5, back by 7.75, B0 on stage 0 until 9.75.
    assert step_s(times, "1f1b", 1) == 9.75
    # The second micro-batch: stage 1 F1 7.5-9.5, B1 9.5-13.5; back by 13.75; stage 0 done at 15.75.
    assert step_s(times, "1f1b", 2) == 15.75
    # GPipe: stage 1 F0 F1 B0 B1 until 13.5 too.
    assert step_s(times, "gpipe", 2) == 15.75


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_plans_at_once_give_the_same_as_one_by_one(schedule: str) -> None:
    rng = random.Random(1)
    plans = [random_times(rng, 5) for _ in range(20)]
    stacked = StageTimes(
        *(
            [
                np.array([getattr(plan, name)[stage] for plan in plans])
                for stage in range(len(getattr(plans[0], name)))
            ]
            for name in ("forward_s", "backward_s", "send_s", "gradient_s")
        )
    )
    together = step_s(stacked, schedule, 7)
    # the last digit aside: from Python 3.12 on, `sum` of plain floats is a compensated one
    assert together.tolist() == pytest.approx([step_s(plan, schedule, 7) for plan in plans], rel=1e-14)


def test_timeline_lists_every_action_in_order_and_without_overlap() -> None:
    times = random_times(random.Random(2), 4)
    schedule = OneFOneB()
    shown = timeline(times, schedule, 6)
    assert shown.step_s == step_s(times, schedule.name, 6)
    for stage, events in enumerate(shown.stages):
        assert [event.action for event in events] == schedule.actions(4, 6)[stage]
        assert all(a.stop_s <= b.start_s + 1e-12 for a, b in itertools.pairwise(events))
    assert max(event.stop_s for events in shown.stages for event in events) == shown.step_s


def test_a_deadlock_is_an_error() -> None:
    backward_first = [Action(ActionKind.BACKWARD, 0), Action(ActionKind.FORWARD, 0)]
    with pytest.raises(ValueError, match="deadlocks"):
        simulate(StageTimes([1.0], [1.0], [], []), [backward_first])


def test_warm_up_deep_enough_hides_slow_links() -> None:
    times = StageTimes(forward_s=[1.0] * 4, backward_s=[1.0] * 4, send_s=[0.9] * 3, gradient_s=[0.9] * 3)
    assert step_s(times, "1f1b", 32) < 0.8 * step_s(times, "1f1b-short", 32)
