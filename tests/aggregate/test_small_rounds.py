"""Rounds that fewer clients begin than the job wants, with an aggregator that needs a number of them.

Rounds that close with fewer than begin are checked when the job is made (`test_job_start.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedmp import Job
from fedmp.aggregate import Krum, MultiKrum
from fedmp.clock import Clock, Hours
from fedmp.errors import RoundError
from fedmp.records import Event, Progress
from fedmp.strategy import Available, Factors, FedAvg, FedBuff
from tests.support.jobs import TINY_MLP, assert_same, images, run, sgd, topology, weights

# each is there for half of the day, from a moment on that is its own
HOURS = Hours(start_h=0, stop_h=12, spread_h=24, run_starts_h=6)
AWAY = FedAvg(local_steps=1, selection=Available())
JOB = Job(
    model=TINY_MLP,
    topology=topology(*[1] * 6),
    data=images(60),
    optimizer=sgd(0.05),
    rounds=1,
    batch_size=10,
    num_microbatches=1,
)


def there(clock: Clock, seed: int = 0) -> set[str]:
    """The clients that can be reached when the run begins."""
    windows = {f"c{i}": clock.availability.window(f"c{i}", 0.0, seed=seed) for i in range(6)}
    return {name for name, window in windows.items() if window is not None and window.start_s <= 0}


def test_a_round_that_is_too_small_for_its_aggregator_ends_before_anyone_trains(tmp_path: Path) -> None:
    clock = Clock(availability=HOURS)
    job = replace(JOB, clock=clock, strategy=AWAY, aggregator=MultiKrum(num_byzantine=1))
    assert len(there(clock)) < 5, "the seed should leave fewer than 2f + 3"
    seen: list[Event] = []
    with pytest.raises(
        RoundError,
        match=rf"round 1 would begin with {len(there(clock))} of the 6 clients that it wants: .* needs at least 2 x 1 "
        r"\+ 3 = 5 clients a round, not \d.* committed is safe: resume the run .* with strategy.min_clients=5",
    ):
        job.run("simulate", run_dir=tmp_path / "run", observe=seen.append)
    assert not [event for event in seen if isinstance(event, Progress)]


def test_with_the_minimum_that_it_is_told_to_set_a_round_waits_for_clients_that_are_away(
    tmp_path: Path,
) -> None:
    clock, strategy = Clock(availability=HOURS), AWAY.model_copy(update={"min_clients": 5})
    job = replace(JOB, clock=clock, strategy=strategy, aggregator=MultiKrum(num_byzantine=1))
    (record,) = run(job, tmp_path / "run").history
    assert len(record.clients) == 5
    assert there(clock) <= set(record.clients)
    assert record.simulated_s > 3600, "the others come later in the day"


def test_a_round_that_is_large_enough_begins_with_those_who_are_there(tmp_path: Path) -> None:
    clock = Clock(availability=HOURS)
    for strategy in (AWAY, AWAY.model_copy(update={"min_clients": 1})):
        job = replace(JOB, clock=clock, strategy=strategy)
        (record,) = run(job, tmp_path / repr(strategy.min_clients)).history
        assert set(record.clients) == there(clock)


@pytest.mark.parametrize(
    ("strategy", "clock"),
    [
        (FedAvg(local_steps=1, min_clients=5), Clock(dropout_probability=0.2)),
        (FedAvg(local_steps=1, min_clients=5, deadline_s=1e-9, late="stale"), Clock(compute_sigma=0.5)),
        (FedBuff(local_steps=1, buffer_size=5, concurrency=3), Clock(compute_sigma=0.5)),
    ],
    ids=["lost", "deadline", "buffer"],
)
def test_rounds_that_close_early_are_never_too_small(strategy: FedAvg, clock: Clock, tmp_path: Path) -> None:
    job = replace(JOB, topology=topology(*[1] * 8), clock=clock, strategy=strategy, rounds=2)
    result = run(replace(job, aggregator=Krum(num_byzantine=1)), tmp_path / "run")
    sizes = [len(record.clients) for record in result.history]
    assert all(5 <= size < 8 for size in sizes), sizes


@pytest.mark.parametrize("engine", ["simulate", pytest.param("local", marks=pytest.mark.slow)])
def test_a_run_that_effort_made_too_small_goes_on_with_another_aggregator(
    engine: str, tmp_path: Path
) -> None:
    effort = Factors(clients={f"c{i}": 0.0 for i in range(1, 4)})
    job = replace(JOB, topology=topology(1, 1, 1, 1), strategy=FedAvg(local_steps=1, effort=effort))
    run(job, tmp_path / "parts")
    with pytest.raises(
        RoundError, match=r"round 2 would begin with 1 of the 4 clients that it wants: .* with another effort"
    ):
        run(replace(job, rounds=2, aggregator=Krum()), tmp_path / "parts", engine, resume=True)
    parts = run(replace(job, rounds=2), tmp_path / "parts", engine, resume=True)
    whole = run(replace(job, rounds=2), tmp_path / "whole")
    assert_same(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)
