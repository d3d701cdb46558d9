"""Late clients in whole runs: simulated against hand-written loops, and over real processes against simulated ones."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedmp import Job, Result
from fedmp.data.order import one_pass
from fedmp.engine.local import LocalEngine
from fedmp.engine.one_by_one import OneByOne
from fedmp.engine.population import SomeClients
from fedmp.engine.session import Outcome, Session, round_settings, run_session
from fedmp.engine.simulate import SimulateEngine
from fedmp.engine.simulated_clients import SimulatedClients
from fedmp.errors import ResumeError
from fedmp.records import Event, Fault, RoundFinished
from fedmp.strategy import FedAvg, FedBuff
from tests.engine.test_oracles import FLOAT64, initial, split_data
from tests.support.jobs import TINY_CNN, assert_same, images, run, sgd, tiny_job, topology, weights

Times = Callable[[str, int], float]


class Timed(SimulateEngine):
    """A simulation in which each client takes as long in each round as a test says."""

    finish_s: Times

    def run(self, session: Session) -> Outcome:
        def finish_s(cohort: SomeClients, round: int) -> list[float]:
            return [self.finish_s(client, round) for client in cohort.names]

        clients = SimulatedClients(session, OneByOne(session), finish_s)
        return Outcome(run_session(session, round_settings(session), clients), 0.0)


def slow(**seconds: float) -> Times:
    """Clients that take so long in all rounds; others take 1 s."""
    return lambda client, round: seconds.get(client, 1.0)


JOB = tiny_job(
    model=initial(), data=images(90, dtype=torch.float64), topology=topology(2, 1, 3), rounds=4, batch_size=16
)
HALF = FedAvg(late="stale", min_clients=1, deadline_s=2.0, local_steps=2)


def local_change(
    job: Job, state: dict[str, torch.Tensor], index: int, round: int
) -> tuple[dict[str, torch.Tensor], int]:
    """A client's update of one local round from a state, and the samples that it processed."""
    model, data = copy.deepcopy(initial()), split_data(job)[index]
    model.load_state_dict(state)
    optimizer = job.optimizer(list(model.parameters()))
    order = one_pass(len(data), seed=job.seed, client=f"c{index}", round=round, epoch=0)
    seen = 0
    for indices in order.split(job.batch_size)[: job.strategy.local_steps]:
        x, y = data.batch(indices)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        seen += len(indices)
    return {name: after - state[name] for name, after in model.state_dict().items()}, seen


def replayed(job: Job, takes: list[dict[str, int]], exponent: float = 0.5) -> dict[str, torch.Tensor]:
    """The global model if each round takes these clients' updates, from the models of these rounds."""
    states = [weights(initial())]
    for round, taken in enumerate(takes, start=1):
        total, samples = {name: torch.zeros_like(w) for name, w in states[0].items()}, 0
        for client, begun in taken.items():
            change, seen = local_change(job, states[begun - 1], int(client[1:]), begun)
            samples += seen
            for name, tensor in change.items():
                total[name] += seen * (1 + round - begun) ** -exponent * tensor
        states.append({name: w + total[name] / samples for name, w in states[-1].items()})
    return states[-1]


def taken(result: Result) -> list[dict[str, int]]:
    """The clients that each round took, by the round that they began with."""
    return [
        {client: record.stale.get(client, record.round) for client in record.clients}
        for record in result.history
    ]


@pytest.mark.parametrize("staleness", ["polynomial", "constant"])
def test_a_stale_update_starts_from_its_own_round_s_model_and_is_discounted(
    staleness: str, tmp_path: Path
) -> None:
    job = replace(JOB, strategy=HALF.model_copy(update={"staleness": staleness}))
    result = run(job, tmp_path / "run", Timed(finish_s=slow(c2=5.0)))
    # rounds end at their deadlines: 2, 4, then 5 s when c2 is in, then 7 s
    expected = [
        {"c0": 1, "c1": 1},
        {"c0": 2, "c1": 2},
        {"c0": 3, "c1": 3, "c2": 1},
        {"c0": 4, "c1": 4},
    ]
    assert taken(result) == expected
    assert [record.late for record in result.history] == [{"c2": 1}, {"c2": 1}, {}, {"c2": 4}]
    assert [record.simulated_s for record in result.history] == [2.0, 2.0, 1.0, 2.0]
    exponent = 0.5 if staleness == "polynomial" else 0.0
    assert_same(weights(result), replayed(job, expected, exponent), **FLOAT64)


def test_over_selection_takes_the_fastest_and_discards_the_others(tmp_path: Path) -> None:
    job = replace(JOB, strategy=FedAvg(fraction=0.6, over_selection=0.5, local_steps=2))
    result = run(job, tmp_path / "run", Timed(finish_s=slow(c1=3.0)))
    assert [record.clients for record in result.history] == [("c0", "c2")] * 4
    assert [record.sat_out for record in result.history] == [("c1",)] * 4
    assert [record.simulated_s for record in result.history] == [1.0] * 4
    assert_same(weights(result), replayed(job, taken(result)), **FLOAT64)


def test_a_client_that_is_too_stale_is_let_go_and_begins_anew(tmp_path: Path) -> None:
    strategy = HALF.model_copy(update={"max_staleness": 1})
    result = run(replace(JOB, strategy=strategy), tmp_path / "run", Timed(finish_s=slow(c2=5.0)))
    assert [record.late for record in result.history] == [{"c2": 1}, {}, {"c2": 3}, {}]
    assert [record.sat_out for record in result.history] == [(), ("c2",), (), ("c2",)]


@pytest.mark.parametrize("engine", ["simulate", "local"])
def test_fedbuff_with_a_buffer_of_all_clients_is_federated_averaging_bit_for_bit(
    engine: str, tmp_path: Path
) -> None:
    job = tiny_job(model=TINY_CNN, data=images(50), topology=topology(2, 1), strategy=FedAvg(local_steps=2))
    buffered = replace(job, strategy=FedBuff(local_steps=2, buffer_size=2))
    averaged = run(job, tmp_path / "averaged", engine)
    result = run(buffered, tmp_path / "buffered", engine)
    assert_same(weights(result), weights(averaged))
    assert [record.stale for record in result.history] == [{}, {}]


def test_fedbuff_equals_algorithm_1_replayed(tmp_path: Path) -> None:
    job = replace(JOB, rounds=6, strategy=FedBuff(buffer_size=2, local_steps=2))
    result = run(job, tmp_path / "run", Timed(finish_s=slow(c0=1.0, c1=1.5, c2=4.0)))
    # a model at 1.5, 3.0, 4.0 s ...: c0 waits for the buffer that it is in; c2 comes with c0 in the third
    assert taken(result)[:3] == [{"c0": 1, "c1": 1}, {"c0": 2, "c1": 2}, {"c0": 3, "c2": 1}]
    assert [record.simulated_s for record in result.history[:3]] == [1.5, 1.5, 1.0]
    assert all(len(record.clients) == 2 for record in result.history)
    assert_same(weights(result), replayed(job, taken(result)), **FLOAT64)


def test_fedbuff_keeps_as_many_clients_at_work_as_it_may(tmp_path: Path) -> None:
    job = replace(JOB, topology=topology(1, 1, 1, 1, 1), strategy=FedBuff(buffer_size=3, concurrency=2))
    result = run(job, tmp_path / "run", Timed(finish_s=slow()))
    # two begin at 0 s and are done at 1 s, a third one begins in their place, and the other goes on
    assert result.history[0].simulated_s == 2.0
    assert [len(record.clients) for record in result.history] == [3] * 4
    assert [len(record.late) for record in result.history] == [1] * 4


def test_a_simulated_run_resumes_with_the_updates_that_were_late(tmp_path: Path) -> None:
    class StopHereError(Exception):
        pass

    def interrupt(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.record.round == 2:
            raise StopHereError

    engine = Timed(finish_s=slow(c2=5.0))
    job = replace(JOB, strategy=HALF)
    whole = run(job, tmp_path / "whole", engine)
    with pytest.raises(StopHereError):
        job.run(engine, run_dir=tmp_path / "parts", observe=interrupt)
    resumed = run(job, tmp_path / "parts", engine, resume=True)
    assert_same(weights(resumed), weights(whole))
    assert taken(resumed) == taken(whole)
    assert [record.simulated_s for record in resumed.history] == [r.simulated_s for r in whole.history]


def test_a_resume_without_the_late_updates_is_refused(tmp_path: Path) -> None:
    job = replace(JOB, rounds=2, strategy=HALF)
    run(job, tmp_path / "run", Timed(finish_s=slow(c2=9.0)))
    for path in (tmp_path / "run" / "journal" / "late").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ResumeError, match=r"late in round 2 \(c2\) cannot be read"):
        run(replace(job, rounds=3), tmp_path / "run", Timed(finish_s=slow(c2=9.0)), resume=True)


def delay(device: str, round: int, delay_s: float) -> Fault:
    return Fault(device=device, round=round, phase="pull", kind="delay", delay_s=delay_s)


def test_over_selection_over_real_processes_does_not_wait_for_the_straggler(tmp_path: Path) -> None:
    job = replace(
        JOB,
        rounds=1,
        strategy=FedAvg(fraction=0.6, over_selection=0.5, local_steps=2),
        faults=(delay("c1/d0", 1, 60),),
    )
    result = run(job, tmp_path / "run", "local")
    assert result.history[0].clients == ("c0", "c2")
    assert result.history[0].sat_out == ("c1",)
    assert result.summary.wall_s < 45
    assert_same(weights(result), replayed(job, [{"c0": 1, "c2": 1}]), **FLOAT64)


@pytest.mark.slow
def test_at_its_deadline_a_round_over_real_processes_closes_with_the_minimum(tmp_path: Path) -> None:
    job = replace(
        JOB,
        rounds=1,
        strategy=FedAvg(local_steps=2, min_clients=2, deadline_s=1.0),
        faults=(delay("c1/d0", 1, 60.0),),
    )
    result = run(job, tmp_path / "run", LocalEngine(silence_timeout_s=60))
    assert result.history[0].clients == ("c0", "c2")
    assert result.history[0].sat_out == ("c1",)
    assert result.summary.wall_s < 45
    assert_same(weights(result), replayed(job, [{"c0": 1, "c2": 1}]), **FLOAT64)


class Counted(torch.optim.SGD):
    """Writes down whose step each is."""

    def __init__(self, parameters: Iterable[torch.Tensor], *, log: Path, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self._log = log

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        with self._log.open("a") as file:
            file.write(f"{multiprocessing.current_process().name}\n")


@pytest.mark.slow
@pytest.mark.parametrize("heal", [True, False])
def test_devices_whose_update_can_no_longer_count_break_off_and_train_the_next_round(
    heal: bool, tmp_path: Path
) -> None:
    """c1 hears after its first step that the round is over: it makes no other, and all of those of round 2."""
    strategy = FedAvg(local_steps=3, min_clients=1, deadline_s=0.5)
    late = Fault(device="c1/d1", round=1, phase="between", step=0, kind="delay", delay_s=9.0)
    job = replace(JOB, topology=topology(1, 2), rounds=2, strategy=strategy, optimizer=sgd(0.05))
    counted = replace(
        job,
        optimizer=partial(Counted, log=tmp_path / "steps", lr=0.05),
        faults=(delay("c0/d0", 1, 4.0), late, delay("c0/d0", 2, 60.0)),  # c1 has begun when the round closes
    )
    result = run(counted, tmp_path / "run", LocalEngine(heal=heal, silence_timeout_s=60))
    assert taken(result) == [{"c0": 1}, {"c1": 2}]
    assert (result.summary.faults, result.summary.recoveries) == (0, 0)
    steps = (tmp_path / "steps").read_text().split("\n")
    assert [steps.count(f"fedmp {name}") for name in ("c0/d0", "c1/d0", "c1/d1")] == [3, 4, 4]
    assert_same(weights(result), replayed(job, [{"c0": 1}, {"c1": 2}]), **FLOAT64)


@pytest.mark.slow
def test_late_clients_over_real_processes_count_as_in_the_simulation(tmp_path: Path) -> None:
    """A device of c2 sleeps through the end of its round, and pulls its stage of that round all the same."""
    job = replace(JOB, rounds=2, strategy=FedBuff(buffer_size=2, local_steps=2))
    late = replace(job, faults=(delay("c2/d1", 1, 4.0), delay("c0/d0", 2, 60.0)))
    result = run(late, tmp_path / "run", LocalEngine(silence_timeout_s=60))
    expected = [{"c0": 1, "c1": 1}, {"c1": 2, "c2": 1}]
    assert taken(result) == expected
    assert_same(weights(result), replayed(job, expected), **FLOAT64)
    times = {("c2", 1): 1.5, ("c0", 2): 60.0}
    simulated = run(
        job, tmp_path / "simulated", Timed(finish_s=lambda client, round: times.get((client, round), 1.0))
    )
    assert taken(simulated) == expected
    assert_same(weights(result), weights(simulated), **FLOAT64)
    assert not (tmp_path / "run" / "journal" / "round-00001").exists()


@pytest.mark.slow
def test_fedbuff_over_real_processes_takes_whoever_comes_first(tmp_path: Path) -> None:
    job = replace(
        JOB,
        topology=topology(2, 1),
        rounds=2,
        strategy=FedBuff(buffer_size=1, local_steps=2),
        faults=(delay("c1/d0", 1, 4.0), delay("c0/d0", 2, 60.0)),
    )
    result = run(job, tmp_path / "run", LocalEngine(silence_timeout_s=60))
    assert taken(result) == [{"c0": 1}, {"c1": 1}]
    assert result.history[1].late == {"c0": 2}
    assert result.summary.wall_s < 45
    assert_same(weights(result), replayed(job, [{"c0": 1}, {"c1": 1}]), **FLOAT64)


@pytest.mark.slow
def test_a_late_device_that_is_killed_pulls_its_old_stage_again(tmp_path: Path) -> None:
    job = replace(
        JOB,
        topology=topology(2, 2),
        rounds=2,
        strategy=FedBuff(buffer_size=1, local_steps=2),
        faults=(
            delay("c1/d1", 1, 3.0),
            Fault(device="c1/d1", round=1, phase="push", kind="kill"),
            delay("c0/d0", 2, 60.0),
        ),
    )
    result = run(job, tmp_path / "run", LocalEngine(silence_timeout_s=60))
    assert taken(result) == [{"c0": 1}, {"c1": 1}]
    assert result.summary.faults == 1
    assert_same(weights(result), replayed(job, [{"c0": 1}, {"c1": 1}]), **FLOAT64)


@pytest.mark.slow
def test_real_processes_go_on_with_a_late_round_when_the_run_is_resumed(tmp_path: Path) -> None:
    """The devices are new ones: they pull the stage that the late client began with, and train it again."""
    job = replace(
        JOB,
        topology=topology(2, 1),
        rounds=1,
        strategy=FedBuff(buffer_size=1, local_steps=2),
        faults=(delay("c1/d0", 1, 60.0),),
    )
    run(job, tmp_path / "run", LocalEngine(silence_timeout_s=60))
    more = replace(job, rounds=2, faults=(delay("c0/d0", 2, 60.0),))
    result = run(more, tmp_path / "run", LocalEngine(silence_timeout_s=60), resume=True)
    assert taken(result) == [{"c0": 1}, {"c1": 1}]
    assert_same(weights(result), replayed(job, [{"c0": 1}, {"c1": 1}]), **FLOAT64)
