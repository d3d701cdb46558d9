"""A client's round in simulated time, against what was computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedmp.clock import Clock, Hours, Loss, slowed_step_s
from fedmp.records import ClockEvent
from fedmp.topology import Link
from tests.clock.samples import LINE, arrivals, plan, times, work


def test_a_round_is_pull_training_and_push() -> None:
    # 1 s latency + 100 B at 100 B/s, 3 steps of 10 s, and back: 1 s + 250 B at 100 B/s
    assert arrivals(work(down=(100.0,), up=(250.0,), num_batches=3)) == [2.0 + 30.0 + 3.5]


def test_a_client_waits_for_its_slowest_device_before_training_and_after() -> None:
    assert arrivals(work(down=(100.0, 300.0), up=(50.0, 20.0))) == [4.0 + 10.0 + 1.5]


def test_a_device_with_nothing_to_move_takes_no_time() -> None:
    assert arrivals(work(down=(0.0,), up=(0.0,))) == [10.0]


def test_the_events_of_a_round_are_those_of_its_devices() -> None:
    (timing,) = times(work(down=(100.0, 300.0), up=(50.0, 20.0)))
    assert sorted(timing.events) == sorted(
        [
            ClockEvent(0.0, "c0", "", "begins"),
            ClockEvent(2.0, "c0", "d0", "pulled"),
            ClockEvent(4.0, "c0", "d1", "pulled"),
            ClockEvent(14.0, "c0", "", "trained"),
            ClockEvent(15.2, "c0", "d1", "pushed"),
            ClockEvent(15.5, "c0", "d0", "pushed"),
            ClockEvent(15.5, "c0", "", "arrived"),
        ]
    )
    assert (timing.attempts, timing.reason) == (1, "")


def test_two_clients_on_a_shared_link_queue_for_it() -> None:
    # both pull 100 B over 100 B/s of the server: 1 s latency, then 2 s; train 10 s; push alike
    shared = Clock(server_bandwidth_bytes_per_s=100.0)
    assert arrivals(work("a"), work("b"), clock=shared) == [16.0, 16.0]
    assert arrivals(work("a"), clock=shared) == [14.0]


def test_the_second_push_begins_when_training_is_over_and_shares_what_is_left() -> None:
    # pulls: both at 50 B/s from 1 s on; done at 3 s. a trains until 13 s, b (11 s steps) until 14 s.
    # pushes: a alone from 14 s, b joins at 15 s, when a has sent 100 of 150 B. a: 50 B at 50 B/s -> 16 s;
    # b by then 50 of 150 B, then alone: 100 B at 100 B/s -> 17 s
    shared = Clock(server_bandwidth_bytes_per_s=100.0)
    first, second = work("a", up=(150.0,)), work("b", up=(150.0,), step_s=11.0)
    assert arrivals(first, second, clock=shared) == [16.0, 17.0]


def test_a_slow_line_leaves_the_rest_of_the_server_to_the_others() -> None:
    # 10 B/s of the slow client leave 90 B/s of the pull; the pushes do not meet
    shared = Clock(server_bandwidth_bytes_per_s=100.0)
    slow = work("slow", uplink=Link(10.0, 1.0))
    fast, slowly = arrivals(work("fast"), slow, clock=shared)
    assert fast == pytest.approx((1 + 100 / 90) + 10 + (1 + 1))
    assert slowly == pytest.approx(2 * (1 + 10) + 10)


def test_a_wide_server_is_no_bottleneck() -> None:
    works = [
        work(f"c{index}", down=(100.0 + index,), up=(50.0,), num_batches=index + 1) for index in range(6)
    ]
    wide = arrivals(*works, clock=Clock(server_bandwidth_bytes_per_s=1e9))
    assert wide == pytest.approx(arrivals(*works), rel=1e-12)


def test_a_pipeline_follows_its_slowest_device() -> None:
    # gpipe, two micro-batches: T = sum of forwards and backwards + the largest forward and backward
    even = plan((1.0, 2.0), (1.0, 2.0), step_s=9.0)
    assert slowed_step_s(even, (1.0, 1.0)) == 9.0
    assert slowed_step_s(even, (1.0, 3.0)) == (1 + 2 + 3 + 6) + (3 + 6)
    uneven = plan((1.0, 2.0), (4.0, 8.0), step_s=27.0)
    assert slowed_step_s(uneven, (2.0, 1.0)) == (2 + 4 + 4 + 8) + (4 + 8)


def test_stragglers_take_the_factor_longer() -> None:
    clock = Clock(straggler_probability=1.0, straggler_factor=3.0)
    one = replace(work(), plan=plan((1.0, 2.0), step_s=6.0))
    assert arrivals(one, clock=clock) == [2.0 + 18.0 + 2.0]


def test_the_share_of_stragglers_is_about_their_probability() -> None:
    works = [replace(work(f"c{index}"), plan=plan((1.0, 2.0), step_s=6.0)) for index in range(400)]
    late = sum(arrival > 10.5 for arrival in arrivals(*works, clock=Clock(straggler_probability=0.25)))
    assert 70 < late < 130  # 100 expected, 8.7 the standard deviation


def test_what_chance_decides_depends_on_seed_round_and_client_alone() -> None:
    noisy = Clock(compute_sigma=0.3, link_sigma=0.3, dropout_probability=0.3)
    works = [work(f"c{index}") for index in range(20)]
    assert arrivals(*works, clock=noisy) == arrivals(*works, clock=noisy)
    assert arrivals(*works, clock=noisy)[7:] == arrivals(*works[7:], clock=noisy)
    assert arrivals(*works, clock=noisy) != arrivals(*works, clock=noisy, round=2)


def test_one_knob_does_not_change_what_another_draws() -> None:
    works = [work(f"c{index}") for index in range(30)]
    lost = [math.isinf(at) for at in arrivals(*works, clock=Clock(dropout_probability=0.4))]
    slower = Clock(dropout_probability=0.4, compute_sigma=0.2, link_sigma=0.2, straggler_probability=0.5)
    assert [math.isinf(at) for at in arrivals(*works, clock=slower)] == lost
    assert 0 < sum(lost) < 30


def test_a_client_that_drops_out_never_arrives_and_says_so() -> None:
    (timing,) = times(work(), clock=Clock(dropout_probability=1.0))
    assert (timing.arrival_s, timing.reason, timing.attempts) == (math.inf, "dropped out", 1)
    lost = next(event for event in timing.events if event.what == "lost")
    assert 2.0 <= lost.time_s <= 12.0  # while it trained


def test_a_client_that_restarts_begins_anew_and_arrives_later() -> None:
    clock = Clock(dropout_probability=0.5, restart_s=5.0)
    works = [work(f"c{index}") for index in range(40)]
    seen = set()
    for timing in times(*works, clock=clock):
        losses = [event.time_s for event in timing.events if event.what == "lost"]
        begins = [event.time_s for event in timing.events if event.what == "begins"]
        assert begins[1:] == [loss + 5.0 for loss in losses]
        assert timing.arrival_s == pytest.approx(begins[-1] + 14.0)
        assert timing.attempts == len(begins)
        seen.add(timing.attempts)
    assert {1, 2, 3} <= seen


def test_a_client_gives_up_after_its_attempts() -> None:
    (timing,) = times(work(), clock=Clock(dropout_probability=1.0, restart_s=0.0, attempts=3))
    assert (timing.attempts, timing.reason) == (3, "dropped out")


def test_a_client_that_is_away_comes_when_it_is_back() -> None:
    night = Clock(availability=Hours(start_h=22, stop_h=6, run_starts_h=20))
    assert arrivals(work(), clock=night) == [2 * 3600.0 + 14.0]
    assert arrivals(work(), clock=night, start_s=3 * 3600.0) == [14.0]


def test_a_client_whose_time_ends_before_it_is_done_leaves() -> None:
    night = Clock(availability=Hours(start_h=22, stop_h=6, run_starts_h=20))
    (timing,) = times(work(), clock=night, start_s=10 * 3600.0 - 13.0)
    assert (timing.arrival_s, timing.reason) == (math.inf, "left before it was done")
    assert ClockEvent(13.0, "c0", "", "left") in timing.events
    (timing,) = times(work(), clock=night, start_s=10 * 3600.0 - 14.0)
    assert timing.arrival_s == 14.0


def test_a_client_that_left_may_go_on_the_next_night() -> None:
    night = Clock(availability=Hours(start_h=22, stop_h=6, run_starts_h=20), restart_s=0.0)
    (timing,) = times(work(), clock=night, start_s=10 * 3600.0 - 13.0)
    assert timing.arrival_s == pytest.approx(13.0 + 16 * 3600.0 + 14.0)


def test_a_client_that_loses_a_device_begins_anew_without_it() -> None:
    clock = Clock(losses=(Loss(device="c0/d1", round=1),), notice_s=5.0)
    then = work(step_s=20.0)
    (timing,) = times(replace(work(down=(100.0, 100.0), up=(1.0, 1.0)), loses="d1", then=then), clock=clock)
    lost = next(event for event in timing.events if event.what == "lost")
    assert lost.device == "d1"
    assert 2.0 < lost.time_s < 12.0
    assert timing.arrival_s == pytest.approx(lost.time_s + 5.0 + 2.0 + 20.0 + 2.0)
    assert timing.attempts == 2


def test_a_client_that_cannot_go_on_without_a_device_is_over_when_it_is_lost() -> None:
    clock = Clock(losses=(Loss(device="c0/d0", round=1),))
    (timing,) = times(replace(work(), loses="d0"), clock=clock)
    assert math.isinf(timing.arrival_s)
    assert timing.reason == "lost d0, and no plan fits the others"
    assert 2.0 < timing.over_s < 12.0


def test_a_line_is_slower_by_its_factor_in_bandwidth_and_latency() -> None:
    clock = Clock(link_sigma=0.5)
    factor = clock.draw("c0", 1, round=1, seed=0).link_slowness
    assert factor != 1.0
    assert arrivals(work(), clock=clock) == [pytest.approx(4.0 * factor + 10.0)]
    assert LINE.transfer_s(100.0) == 2.0
