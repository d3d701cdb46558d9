"""Global stages sent as differences: what clients end with, to whom they are sent whole, and what that takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmp.coordinator import GlobalModel
from fedmp.engine.simulate import SimulateEngine
from fedmp.errors import ConfigError, ResumeError
from fedmp.strategy import FedAvg, Scaffold, StreamingDiLoCo
from fedmp.updates import EF21, Channel, Int8, PayloadError, TopK, Zstd
from tests.coordinator.test_transformed import SPECS, trained, wire
from tests.engine.test_ef21 import noise, top
from tests.strategy.test_references import FLOAT64, Reference, Tensors, add, job, mean, plain
from tests.support.jobs import assert_same, run, tiny_job, topology, weights

DOWN = (EF21(), TopK(fraction=0.05))


def both_ways(reference: Reference) -> Tensors:
    """The downlink of EF21-BC: clients train from w, which follows x by what is largest of their difference."""
    x = dict(reference.state)
    w = dict(x)
    for round in range(1, 5):
        w = {name: w[name] + top(x[name] - w[name]) for name in x}
        reference.state = w
        locals = [reference.train(client, round, plain) for client in reference.cohort(round)]
        total = sum(local.num_samples for local in locals)
        x = add(x, mean([local.change for local in locals], [local.num_samples / total for local in locals]))
    return x


def test_differences_lead_to_the_model_of_a_loop_written_from_the_paper(tmp_path: Path) -> None:
    ours = job(FedAvg(fraction=0.5), downlink=DOWN, data=noise())
    assert_same(weights(run(ours, tmp_path)), both_ways(Reference(ours)), **FLOAT64)


def test_devices_and_simulated_clients_are_sent_the_same_and_the_whole_after_a_round_away(
    tmp_path: Path,
) -> None:
    ours = tiny_job(
        strategy=FedAvg(fraction=0.5), topology=topology(2, 1, 1), downlink=(*DOWN, Int8()), rounds=5
    )
    simulated, local = run(ours, tmp_path / "simulate"), run(ours, tmp_path / "local", "local")
    assert_same(weights(local), weights(simulated), rtol=0, atol=1e-6)
    downs = [record.bytes_down for record in simulated.history]
    assert [record.bytes_down for record in local.history] == downs
    whole = downs[0]
    before: set[str] = set()
    for record, down in zip(simulated.history, downs, strict=True):
        assert (down < 0.1 * whole) == (set(record.clients) <= before)
        assert (down > 0.95 * whole) == before.isdisjoint(record.clients)
        before = set(record.clients)
    assert (
        min(downs) < 0.1 * whole < 0.4 * whole < max(downs[1:])
    )  # all came again, and somebody had been away


@pytest.mark.parametrize("engine", ["simulate", pytest.param("local", marks=pytest.mark.slow)])
def test_what_clients_have_received_survives_a_resumed_run_bit_for_bit(tmp_path: Path, engine: str) -> None:
    settings: dict[str, Any] = {"downlink": (*DOWN, Zstd()), "transforms": (Int8(),), "strategy": Scaffold()}
    settings |= {"topology": topology(2, 1), "optimizer": tiny_job().optimizer}
    whole = run(tiny_job(**settings, rounds=4), tmp_path / "whole", engine)
    run(tiny_job(**settings, rounds=2), tmp_path / "part", engine)
    part = run(tiny_job(**settings, rounds=4), tmp_path / "part", engine, resume=True)
    assert_same(weights(part), weights(whole))


def test_a_cohort_trained_at_once_is_sent_the_same_differences(tmp_path: Path) -> None:
    ours = tiny_job(downlink=(*DOWN, Int8()), rounds=3, topology=topology(1, 1, 1))
    at_once = run(ours, tmp_path / "vectorized", SimulateEngine(cohort="vectorized"))
    in_turn = run(ours, tmp_path / "sequential", SimulateEngine(cohort="sequential"))
    assert_same(weights(at_once), weights(in_turn), rtol=0, atol=1e-5)
    downs = [record.bytes_down for record in at_once.history]
    assert downs == [record.bytes_down for record in in_turn.history]
    assert downs[1] < 0.2 * downs[0]


def test_what_a_client_has_comes_nearer_while_the_model_rests() -> None:
    channel = Channel(DOWN, SPECS, seed=0, direction="down")
    model = GlobalModel(
        SPECS,
        {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in SPECS.items()},
        downlink=channel,
    )
    model.apply(trained())
    held: dict[str, torch.Tensor] = {}
    gaps = []
    for round in range(1, math.ceil(1 / 0.05) + 1):
        model.open(round)
        difference = model.difference(round, round - 1)
        payload = model.handed_out if difference is None else channel.replaced(model.handed_out, difference)
        held = wire(downlink=DOWN).unpack(payload, round=round, held=held)
        assert torch.equal(held["big.weight"], model.handed_out["big.weight"])
        gaps.append(float((held["big.weight"] - model.state["big.weight"]).norm()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == 0.0
    assert model.difference(round, round) is None


def test_a_difference_to_what_was_never_received_is_refused() -> None:
    channel = Channel(DOWN, SPECS, seed=3, direction="down")
    payload, _ = channel.encode(trained(), {}, sender="", round=2)
    with pytest.raises(PayloadError, match=r"big.weight came as a difference to what was never received"):
        wire(downlink=DOWN).unpack(payload, round=2)


def test_a_run_goes_on_with_the_downlink_that_it_began_with(tmp_path: Path) -> None:
    run(tiny_job(rounds=1), tmp_path)
    with pytest.raises(
        ResumeError, match="has not what clients received as differences, and downlink has ef21"
    ):
        run(tiny_job(rounds=2, downlink=DOWN), tmp_path, resume=True)


def test_fragments_are_not_sent_as_differences(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"StreamingDiLoCo's clients have one of 3 fragments; leave ef21 out"
    ):
        run(tiny_job(strategy=StreamingDiLoCo(local_steps=1), downlink=DOWN), tmp_path)
