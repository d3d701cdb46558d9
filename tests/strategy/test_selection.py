"""Who takes part, and how much each does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedmp import strategy as s
from fedmp.clock import Clock, Hours
from fedmp.strategy import ClientFacts, FedAvg
from tests.support.jobs import images, run, tiny_job, topology

CLIENTS = [f"c{index}" for index in range(6)]


def test_clients_with_more_samples_are_picked_more_often() -> None:
    facts = {name: ClientFacts(num_samples=10 * (index + 1)) for index, name in enumerate(CLIENTS)}
    chosen = Counter(
        name
        for round in range(2000)
        for name in s.Weighted().select(CLIENTS, 1, round=round, seed=0, facts=facts)
    )
    for index, name in enumerate(CLIENTS):  # 210 samples in all; four standard deviations
        assert chosen[name] / 2000 == pytest.approx((index + 1) / 21, abs=0.04)


def test_power_of_choice_takes_the_highest_losses_of_its_candidates() -> None:
    losses = dict(zip(CLIENTS, [0.1, 3.0, 0.2, 2.0, 0.3, 1.0], strict=True))
    facts = {name: ClientFacts(10, loss) for name, loss in losses.items()}
    choice = s.PowerOfChoice(num_candidates=6)
    assert choice.select(CLIENTS, 2, round=1, seed=0, facts=facts) == ("c1", "c3")
    facts["c4"] = ClientFacts(10)
    assert choice.select(CLIENTS, 2, round=1, seed=0, facts=facts) == ("c1", "c4"), (
        "who never took part is first"
    )
    few = s.PowerOfChoice(num_candidates=2)
    assert any(few.select(CLIENTS, 1, round=round, seed=0, facts=facts) == ("c2",) for round in range(60))


def test_power_of_choice_goes_by_the_losses_that_clients_report(tmp_path: Path) -> None:
    strategy = FedAvg(fraction=0.5, local_steps=1, selection=s.PowerOfChoice(num_candidates=4))
    history = run(
        tiny_job(topology=topology(1, 1, 1, 1), strategy=strategy, rounds=2), tmp_path / "run"
    ).history
    assert sorted((*history[0].clients, *history[1].clients)) == ["c0", "c1", "c2", "c3"], (
        "the new ones come first"
    )


def test_only_those_are_asked_who_are_there() -> None:
    facts = {name: ClientFacts(is_available=name in ("c1", "c4")) for name in CLIENTS}
    assert s.Available().select(CLIENTS, 3, round=1, seed=0, facts=facts) == ("c1", "c4")
    nobody = {name: ClientFacts(is_available=False) for name in CLIENTS}
    assert len(s.Available().select(CLIENTS, 3, round=1, seed=0, facts=nobody)) == 3


def test_a_cohort_has_the_minimum_even_where_fewer_are_there() -> None:
    there = ("c1", "c4", "c5")
    facts = {name: ClientFacts(is_available=name in there) for name in CLIENTS}
    for least, size in ((1, 3), (3, 3), (5, 5), (len(CLIENTS), len(CLIENTS))):
        strategy = FedAvg(min_clients=least, selection=s.Available())
        cohort = strategy.cohort(CLIENTS, round=2, seed=0, facts=facts)
        assert set(there) <= set(cohort), "those who are there come first"
        assert cohort == tuple(name for name in CLIENTS if name in cohort)
        assert len(cohort) == size
    assert (
        len(
            FedAvg(min_clients=5, selection=s.Available()).cohort(
                CLIENTS, round=2, seed=0, size=2, facts=facts
            )
        )
        == 2
    )


def test_a_simulated_job_knows_who_is_away_by_its_clock(tmp_path: Path) -> None:
    strategy = FedAvg(fraction=0.5, local_steps=1, selection=s.Available())
    away = {name: ClientFacts(is_available=False) for name in ("c0", "c1", "c2", "c3")}
    job = tiny_job(
        topology=topology(1, 1, 1, 1),
        data=images(60),
        strategy=strategy,
        clock=Clock(availability=Hours(start_h=0, stop_h=12, spread_h=24, run_starts_h=6)),
        rounds=1,
    )
    there = [
        name
        for name in away
        if (window := job.clock.availability.window(name, 0.0, seed=job.seed)) is not None
        and window.start_s <= 0
    ]
    assert 0 < len(there) < 4, "the seed should leave some, and not all"
    assert set(run(job, tmp_path / "run").history[0].clients) <= set(there)


def test_stragglers_do_a_part_and_are_others_in_each_round() -> None:
    effort = s.Stragglers(fraction=0.9, least=0.2)
    shares = [effort.share(name, round=round, seed=0) for name in CLIENTS for round in range(300)]
    assert sum(share < 1 for share in shares) / len(shares) == pytest.approx(0.9, abs=0.03)
    partial = [share for share in shares if share < 1]
    assert 0.2 <= min(partial) < 0.25
    assert sum(partial) / len(partial) == pytest.approx(0.6, abs=0.02)


def test_stragglers_that_are_dropped_are_not_in_the_cohort_unless_nobody_else_is() -> None:
    some = FedAvg(effort=s.Stragglers(fraction=0.5, drop=True))
    sizes = [len(some.cohort(CLIENTS, round=round, seed=0)) for round in range(200)]
    assert sum(sizes) / 200 == pytest.approx(3, abs=0.4)
    every = FedAvg(effort=s.Stragglers(fraction=1.0, drop=True))
    assert len(every.cohort(CLIENTS, round=1, seed=0)) == 1


def test_partial_work_is_counted_as_what_it_is(tmp_path: Path) -> None:
    strategy = FedAvg(local_epochs=2, effort=s.Factors(clients={"c0": 0.5}))
    record = run(tiny_job(strategy=strategy, rounds=1), tmp_path / "run").history[0]
    assert record.num_examples == 45 + 90
