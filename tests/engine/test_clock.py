"""Simulated rounds take as long as the clock says, and close with whom it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedmp import Topology
from fedmp.clock import Clock, Loss, ideal_round_s
from fedmp.engine.client_plan import plan_anew
from fedmp.engine.prepare import prepare
from fedmp.engine.simulate import SimulateEngine
from fedmp.errors import RoundError
from fedmp.report.run_directory import RunDirectory
from fedmp.strategy import FedAvg, Stragglers
from fedmp.updates import BFloat16
from tests.support.jobs import run, tiny_job, topology

FOUR = topology(2, 1, 2, 1)


def test_with_nothing_set_a_round_takes_what_plans_and_links_predict(tmp_path: Path) -> None:
    job = tiny_job(topology=FOUR)
    setups = prepare(job).clients.values()
    by_hand = []
    for setup in setups:
        moves = [setup.client.uplink.transfer_s(device.down_bytes) for device in setup.moved]
        back = [setup.client.uplink.transfer_s(device.up_bytes) for device in setup.moved]
        steps = setup.work.num_batches(len(setup.own_samples))
        by_hand.append(max(moves) + steps * setup.plan.step_s + max(back))
    result = run(job, tmp_path)
    assert [setup.predicted_s for setup in setups] == pytest.approx(by_hand, rel=1e-12)
    assert [record.simulated_s for record in result.history] == [max(s.predicted_s for s in setups)] * 2
    assert result.summary.simulated_s == sum(record.simulated_s for record in result.history)


def test_the_events_tell_of_every_device_and_add_up(tmp_path: Path) -> None:
    result = run(tiny_job(topology=FOUR), tmp_path)
    rounds = RunDirectory.create(tmp_path).read_events()
    assert [timed.round for timed in rounds] == [1, 2]
    assert rounds[1].start_s == pytest.approx(result.history[0].simulated_s, rel=1e-8)
    for timed in rounds:
        what = [event.what for event in timed.events]
        assert (what.count("pulled"), what.count("pushed"), what.count("arrived")) == (6, 6, 4)
        assert timed.events[-1].what == "closed"
    assert (tmp_path / "pictures" / "clock.svg").is_file()


def test_clients_whose_work_varies_take_as_long_as_it_does(tmp_path: Path) -> None:
    job = tiny_job(topology=FOUR, strategy=FedAvg(effort=Stragglers(fraction=1.0)), batch_size=2, rounds=4)
    setups = prepare(job).clients
    run(job, tmp_path)
    seen = set()
    for timed in RunDirectory.create(tmp_path).read_events():
        arrived_s = {event.client: event.time_s for event in timed.events if event.what == "arrived"}
        for name, setup in setups.items():
            work = setup.round_work(len(setup.own_rows), round=timed.round)
            # nine digits of the seconds since the run began are written down
            assert arrived_s[name] == pytest.approx(ideal_round_s(work), abs=2e-9)
            seen.add((name, work.num_batches))
    assert len(seen) > len(setups)  # it did vary


def test_a_clock_without_a_log_leaves_none(tmp_path: Path) -> None:
    run(tiny_job(clock=Clock(log=False), rounds=1), tmp_path)
    assert not (tmp_path / "events.jsonl").exists()
    assert not (tmp_path / "pictures" / "clock.svg").exists()


def test_conditions_change_times_but_not_what_is_learnt(tmp_path: Path) -> None:
    plain = run(tiny_job(topology=FOUR), tmp_path / "plain")
    clock = Clock(server_bandwidth_bytes_per_s=1e5, compute_sigma=0.2, straggler_probability=0.5)
    slow = run(tiny_job(topology=FOUR, clock=clock), tmp_path / "slow")
    assert slow.summary.simulated_s > 2 * plain.summary.simulated_s
    assert [r.test_loss for r in slow.history] == [r.test_loss for r in plain.history]


def test_clients_that_drop_out_are_left_out_of_the_round(tmp_path: Path) -> None:
    clock = Clock(dropout_probability=0.4)
    job = tiny_job(topology=FOUR, clock=clock, strategy=FedAvg(min_clients=1), rounds=3)
    result = run(job, tmp_path)
    for record in result.history:
        lost = {
            setup.name
            for setup in prepare(job).clients.values()
            if clock.draw(setup.name, len(setup.moved), round=record.round, seed=job.seed).is_lost[0]
        }
        assert set(record.sat_out) == lost
        assert set(record.clients) == {"c0", "c1", "c2", "c3"} - lost
        assert record.faults == len(lost)
    assert 0 < result.summary.faults < 12


def test_a_round_that_too_few_finish_fails_and_says_who(tmp_path: Path) -> None:
    job = tiny_job(clock=Clock(dropout_probability=1.0))
    with pytest.raises(RoundError, match=r"0 of 2 clients ever finish round 1, 2 are needed; .*c0, c1"):
        run(job, tmp_path)


def test_a_client_that_loses_a_device_redoes_the_round_and_goes_on_more_slowly(tmp_path: Path) -> None:
    losses = (Loss(device="c0/d1", round=2), Loss(device="c1/d0", round=3))
    clock = Clock(losses=losses, notice_s=7.0)
    job = tiny_job(topology=FOUR, clock=clock, strategy=FedAvg(min_clients=3), rounds=4)
    result = run(job, tmp_path / "whole")
    setups = prepare(job).clients
    alone = plan_anew(prepare(job), setups["c0"], [setups["c0"].client.devices[0]]).predicted_s
    first, second, third, fourth = result.history
    assert first.simulated_s == max(setup.predicted_s for setup in setups.values())
    assert 7.0 + alone < second.simulated_s < 7.0 + alone + setups["c0"].predicted_s
    assert (second.recoveries, second.faults, second.sat_out) == (1, 1, ())
    # c1 has lost its only device: c0, c2 and c3 go on
    assert (third.sat_out, fourth.sat_out) == (("c1",), ("c1",))
    assert third.simulated_s == max(alone, *(setups[name].predicted_s for name in ("c2", "c3")))

    run(replace(job, rounds=2), tmp_path / "parts")
    resumed = run(job, tmp_path / "parts", resume=True)
    assert [r.simulated_s for r in resumed.history] == [r.simulated_s for r in result.history]


def test_a_resumed_run_has_the_same_weather(tmp_path: Path) -> None:
    clock = Clock(compute_sigma=0.3, dropout_probability=0.3, restart_s=1.0)
    whole = run(tiny_job(topology=FOUR, clock=clock, rounds=3), tmp_path / "whole")
    run(tiny_job(topology=FOUR, clock=clock, rounds=2), tmp_path / "parts")
    parts = run(tiny_job(topology=FOUR, clock=clock, rounds=3), tmp_path / "parts", resume=True)
    assert [r.simulated_s for r in parts.history] == [r.simulated_s for r in whole.history]
    first, second = (RunDirectory.create(tmp_path / name).read_events() for name in ("whole", "parts"))
    assert first == second


def test_what_is_compressed_takes_less_time_to_push(tmp_path: Path) -> None:
    slow = Topology(
        clients=[{"name": "c0", "devices": 1, "uplink": {"bandwidth_bytes_per_s": 1e4, "latency_s": 0}}]
    )
    planned = SimulateEngine(cohort="sequential")
    plain = run(tiny_job(topology=slow, rounds=1), tmp_path / "plain", planned).history[0]
    job = tiny_job(topology=slow, rounds=1, transforms=(BFloat16(),))
    half = run(job, tmp_path / "half", planned).history[0]
    push_s = sum(tensor.numel() * 4 for tensor in prepare(tiny_job()).model.state_dict().values()) / 1e4
    assert plain.simulated_s - half.simulated_s == pytest.approx(push_s / 2, rel=0.05)
