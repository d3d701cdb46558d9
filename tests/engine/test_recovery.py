"""Clients that heal: a run that loses devices ends with the very model of an undisturbed one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmp import Job, Result
from fedmp.engine.local import LocalEngine
from fedmp.errors import RoundError
from fedmp.models import MLP
from fedmp.records import Event, Fault, Note
from fedmp.report import RunDirectory
from fedmp.strategy import FedAvg
from tests.support.jobs import TINY_CNN, assert_same, images, run, tiny_job, topology, weights

JOB = tiny_job(
    model=partial(MLP, 784, (16, 14, 12)),
    topology=topology(3, 1),
    data=images(60),
    num_microbatches=4,
    strategy=FedAvg(local_steps=2),
)
QUICK = LocalEngine(silence_timeout_s=2, transfer_timeout_s=3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights(run(JOB, tmp_path_factory.mktemp("undisturbed"), "local"))


def fault(device: str = "c0/d1", **fields: Any) -> Fault:
    return Fault(**{"device": device, "round": 2, "kind": "kill", "phase": "forward", **fields})


def disturbed(
    folder: Path, *faults: Fault, job: Job = JOB, engine: LocalEngine = QUICK
) -> tuple[Result, list[str]]:
    """A run with faults, and what was told of them."""
    notes: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.message)

    result = replace(job, faults=faults).run(engine, run_dir=folder / "run", observe=observe)
    return result, notes


PHASES: list[dict[str, Any]] = [
    {"phase": "pull"},
    {"phase": "between"},
    {"phase": "push"},
    *({"phase": phase, "microbatch": m} for phase in ("forward", "backward", "send") for m in range(4)),
]
SAMPLE = [
    ("c0/d0", {"phase": "push", "kind": "kill"}),
    ("c0/d1", {"phase": "backward", "microbatch": 2, "kind": "kill"}),
    ("c0/d2", {"phase": "forward", "microbatch": 1, "kind": "stop"}),
]


@pytest.mark.parametrize(("device", "what"), SAMPLE)
def test_a_device_that_is_lost_leaves_no_trace_in_the_model(
    device: str, what: dict[str, Any], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    result, notes = disturbed(tmp_path, fault(device, **what))
    assert_same(weights(result), undisturbed)
    how = "killed by SIGKILL" if what["kind"] == "kill" else "silent for 2 s"
    name = device.partition("/")[2]
    assert any(f"device {name} of c0" in note and how in note for note in notes), notes
    assert [record.faults for record in result.history] == [0, 1]
    assert result.history[1].recoveries >= 1
    assert result.summary.faults == 1
    assert RunDirectory.create(tmp_path / "run").read_metrics() == result.history


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "stop"])
@pytest.mark.parametrize("device", ["c0/d0", "c0/d1", "c0/d2", "c1/d0"])
@pytest.mark.parametrize("what", PHASES, ids=lambda what: "-".join(map(str, what.values())))
def test_kill_matrix(
    device: str, kind: str, what: dict[str, Any], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Every phase, stage and micro-batch; a last stage sends nothing forward, a lone one nothing at all."""
    result, notes = disturbed(tmp_path, fault(device, kind=kind, **what))
    assert_same(weights(result), undisturbed)
    happens = not (what["phase"] == "send" and device == "c1/d0")
    assert result.summary.faults == int(happens), notes


@pytest.mark.parametrize(
    ("kind", "phase"),
    [
        ("corrupt", "send"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [("drop", "send"), ("drop", "push"), ("corrupt", "push"), ("delay", "send")]
        ),
    ],
)
def test_messages_that_are_lost_damaged_or_late_leave_no_trace_in_the_model(
    kind: str, phase: str, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    injected = fault(kind=kind, phase=phase, delay_s=0.3 if kind == "delay" else 0.0)
    result, _ = disturbed(tmp_path, injected)
    assert_same(weights(result), undisturbed)
    assert result.summary.faults == 0
    assert result.summary.recoveries == int(phase == "send" and kind != "delay")


@pytest.mark.parametrize(
    "again",
    [
        {"phase": "meet"},
        *(
            pytest.param(what, marks=pytest.mark.slow)
            for what in [
                {"phase": "meet", "kind": "stop"},
                {"phase": "meet", "device": "c0/d0"},
                {"phase": "meet", "device": "c0/d2"},
                {"phase": "pull"},
                {"phase": "pull", "device": "c0/d0", "kind": "stop"},
                {"phase": "forward", "device": "c0/d2"},
                {"phase": "push", "device": "c0/d0"},
            ]
        ),
    ],
    ids=lambda what: "-".join(map(str, what.values())),
)
def test_recovery_survives_a_second_loss(
    again: dict[str, Any], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    result, _ = disturbed(tmp_path, fault(), fault(**{"attempt": 2, **again}))
    assert_same(weights(result), undisturbed)
    assert result.summary.faults == 2


def test_a_client_goes_on_over_the_devices_that_are_left(tmp_path: Path) -> None:
    """A second one is lost under the new plan. Whatever the plan, the model is the same but for rounding."""
    engine = QUICK.model_copy(update={"restarts": 0})
    # the neighbours of the first may have begun the second attempt before the plan is made
    second = [fault("c0/d2", phase="pull", attempt=attempt) for attempt in (2, 3)]
    result, notes = disturbed(tmp_path, fault(), *second, engine=engine)
    expected = weights(run(JOB, tmp_path / "expected", "simulate"))
    assert_same(weights(result), expected, rtol=1e-5, atol=1e-6)
    assert [note.partition("; ")[2] for note in notes if "does not come back" in note] == [
        "its client goes on over d0, d2",
        "its client goes on over d0",
    ]
    assert [record.clients for record in result.history] == [("c0", "c1")] * 2


def test_a_client_without_a_device_sits_the_round_out_and_comes_back(tmp_path: Path) -> None:
    job = replace(JOB, rounds=3, strategy=FedAvg(local_steps=2, min_clients=1))
    engine = QUICK.model_copy(update={"restarts": 0})
    result, _ = disturbed(tmp_path, fault("c1/d0"), job=job, engine=engine)
    assert [record.clients for record in result.history] == [("c0", "c1"), ("c0",), ("c0", "c1")]
    assert [record.sat_out for record in result.history] == [(), ("c1",), ()]


@pytest.mark.slow
def test_a_client_that_is_late_misses_the_round_and_takes_part_in_the_next(tmp_path: Path) -> None:
    job = replace(JOB, rounds=4, strategy=FedAvg(local_steps=2, min_clients=1))
    late = fault("c0/d2", kind="delay", phase="pull", delay_s=4.0)
    engine = LocalEngine(round_timeout_s=3.0)
    result, _ = disturbed(tmp_path, late, job=job, engine=engine)
    assert result.history[1].sat_out == ("c0",)
    assert ("c0", "c1") in [record.clients for record in result.history[2:]]


def test_a_round_that_lost_too_many_clients_says_why_and_can_be_resumed(
    undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    engine = QUICK.model_copy(update={"restarts": 0})
    with pytest.raises(
        RoundError,
        match=r"1 of 2 clients are left.* all are needed; c1: device d0 of c1 .*SIGKILL.* no device is",
    ):
        disturbed(tmp_path, fault("c1/d0"), engine=engine)
    assert_same(weights(run(JOB, tmp_path / "run", "local", resume=True)), undisturbed)


def test_a_pipeline_that_breaks_again_and_again_is_given_up(tmp_path: Path) -> None:
    engine = QUICK.model_copy(update={"attempts": 3})
    faults = [fault(phase="send", kind="corrupt", attempt=attempt) for attempt in (1, 2, 3)]
    with pytest.raises(RoundError, match=r"c0: 3 attempts failed, the last one: .*unexpected frame"):
        disturbed(tmp_path, *faults, engine=engine)


@pytest.mark.slow
def test_statistics_that_stay_at_the_clients_begin_a_round_anew_as_it_began(tmp_path: Path) -> None:
    job = replace(JOB, model=TINY_CNN, strategy=FedAvg(local_steps=2, keep_statistics_local=True))
    expected = weights(run(job, tmp_path / "expected", "local"))
    result, _ = disturbed(tmp_path, fault(phase="send", kind="corrupt", step=1), job=job)
    assert_same(weights(result), expected)


@pytest.mark.slow
def test_ten_of_fifty_devices_are_killed_and_all_rounds_commit(tmp_path: Path) -> None:
    job = tiny_job(
        model=partial(MLP, 784, (16, 15, 14, 13, 12)),
        topology=topology(*[5] * 10),
        data=images(300),
        rounds=5,
        strategy=FedAvg(local_steps=3),
    )
    order = torch.randperm(50, generator=torch.Generator().manual_seed(5)).tolist()[:10]
    faults = [
        fault(f"c{number // 5}/d{number % 5}", round=1 + index % 5, microbatch=index % 3)
        for index, number in enumerate(order)
    ]
    engine = LocalEngine(silence_timeout_s=30, transfer_timeout_s=60)
    result, _ = disturbed(tmp_path, *faults, job=job, engine=engine)
    assert [len(record.clients) for record in result.history] == [10] * 5
    assert result.summary.faults == 10
    assert_same(weights(result), weights(run(job, tmp_path / "expected", engine)))
