"""EF21 in whole jobs, against a loop written from the paper, over partial participation, restarts and losses."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fedmp.client import StateStore, Wire
from fedmp.coordinator import Journal
from fedmp.data import ArrayData
from fedmp.engine.local import LocalEngine
from fedmp.errors import RefusedError
from fedmp.records import DeviceReport, Fault
from fedmp.strategy import FedAvg
from fedmp.updates import EF21, Channel, Clip, Int8, LowRank, TopK, Zstd
from tests.coordinator.test_transformed import PUSHED, SPECS, trained
from tests.engine.test_late import HALF, Timed, slow
from tests.strategy.test_references import FLOAT64, Reference, Tensors, add, job, mean, plain
from tests.support.deployment import Deployment, ends
from tests.support.jobs import assert_same, run, tiny_job, topology, weights

FRACTION = 0.05
CHAIN = (EF21(), TopK(fraction=FRACTION))


def noise() -> ArrayData:
    """Inputs that are all different: of pixels that are alike, it would be chance which is among the largest."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(120, 784, generator=random, dtype=torch.float64)
    y = torch.randint(10, (120,), generator=random)
    return ArrayData(x[:100], y[:100], x[100:], y[100:])


def ef21(reference: Reference) -> Tensors:
    """Algorithm 2 with the clients of a round in place of all, and their local work in place of a gradient."""
    held: dict[str, Tensors] = {}
    for round in range(1, 5):
        locals = {client: reference.train(client, round, plain) for client in reference.cohort(round)}
        for client, local in locals.items():
            estimate = held.get(client) or {n: torch.zeros_like(c) for n, c in local.change.items()}
            held[client] = {n: estimate[n] + top(c - estimate[n]) for n, c in local.change.items()}
        total = sum(local.num_samples for local in locals.values())
        shares = [local.num_samples / total for local in locals.values()]
        reference.state = add(reference.state, mean([held[client] for client in locals], shares))
    return reference.state


def top(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() < 64:  # travels as it is
        return tensor
    count = math.ceil(FRACTION * tensor.numel())
    places = tensor.abs().flatten().topk(count).indices
    return torch.zeros_like(tensor).flatten().index_copy(0, places, tensor.flatten()[places]).view_as(tensor)


@pytest.mark.parametrize(("engine", "fraction"), [("simulate", 1.0), ("simulate", 0.5), ("local", 0.5)])
def test_ef21_is_the_papers_algorithm(tmp_path: Path, engine: str, fraction: float) -> None:
    ours = job(FedAvg(fraction=fraction), transforms=CHAIN, data=noise())
    assert_same(weights(run(ours, tmp_path, engine)), ef21(Reference(ours)), **FLOAT64)


@pytest.mark.parametrize("engine", ["simulate", pytest.param("local", marks=pytest.mark.slow)])
def test_what_both_sides_hold_survives_a_resumed_run_bit_for_bit(tmp_path: Path, engine: str) -> None:
    settings: dict[str, Any] = {"transforms": (Clip(max_norm=0.5), EF21(), LowRank(), Int8(), Zstd())}
    settings |= {"strategy": FedAvg(fraction=0.5), "topology": topology(2, 1, 1)}
    whole = run(tiny_job(**settings, rounds=4), tmp_path / "whole", engine)
    run(tiny_job(**settings, rounds=2), tmp_path / "part", engine)
    part = run(tiny_job(**settings, rounds=4), tmp_path / "part", engine, resume=True)
    assert_same(weights(part), weights(whole))


def test_a_late_update_counts_from_what_the_client_last_had_counted(tmp_path: Path) -> None:
    """With everything sent, EF21 is no loss at all, whichever estimate it starts from: both must be the same one."""
    settings: dict[str, Any] = {"strategy": HALF, "topology": topology(2, 1, 3), "rounds": 4}
    times = Timed(finish_s=slow(c1=5.0))
    plain_run = run(tiny_job(**settings), tmp_path / "plain", times)
    ours = run(tiny_job(**settings, transforms=(EF21(), TopK(fraction=1.0))), tmp_path / "ef21", times)
    assert any(record.stale for record in ours.history)
    assert_same(weights(ours), weights(plain_run), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_device_that_is_lost_and_cut_anew_does_not_part_the_two_sides(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"transforms": CHAIN, "rounds": 3}
    undisturbed = run(tiny_job(**settings), tmp_path / "undisturbed", "local")
    again = Fault(device="c0/d1", round=2, phase="push", kind="kill")
    disturbed = run(tiny_job(**settings, faults=(again,)), tmp_path / "again", "local")
    assert_same(weights(disturbed), weights(undisturbed))
    anew = run(tiny_job(**settings, faults=(again,)), tmp_path / "anew", LocalEngine(restarts=0))
    assert_same(weights(anew), weights(undisturbed), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_coordinator_killed_before_a_commit_holds_the_same_estimates_again(tmp_path: Path) -> None:
    ours = tiny_job(transforms=CHAIN, rounds=3, topology=topology(2, 1))
    expected = weights(run(ours, tmp_path / "local", "local"))
    with Deployment(tmp_path, ours) as federation:
        devices = federation.devices()
        assert ends(federation.coordinator(kill_at="before the commit", nth=2)) == -signal.SIGKILL
        assert ends(federation.coordinator()) == 0
        assert [ends(device) for device in devices] == [0] * 3
        assert_same(federation.final_state(), expected)


class Ends:
    """A client and a coordinator's journal, round after round."""

    def __init__(self, folder: Path) -> None:
        uplink = Channel(CHAIN, SPECS, seed=3)
        self.wire = Wire("ann", uplink, Channel((), SPECS, seed=3, direction="down"))
        self.journal = Journal(folder / "j", SPECS, uplink=uplink, estimates=StateStore(folder / "held"))

    def send(
        self, round: int, key: str, kept: dict[str, torch.Tensor], report: DeviceReport
    ) -> dict[str, torch.Tensor]:
        payload, state = self.wire.pack(trained(round), kept, round=round)
        self.journal.open(round, states={"ann": key} if key else {})
        part = self.journal.temporary("ann", 0)
        part.write_bytes(save(payload, {"report": report.model_dump_json()}))
        self.journal.accept(part, "ann", 0, PUSHED)
        return state

    def taken(self) -> torch.Tensor:
        update = self.journal.update_of("ann", 1)
        assert update is not None
        tensor = update["big.weight"]
        self.journal.remember([update])
        return tensor


def test_a_client_that_lost_its_estimate_says_so_and_both_begin_anew(tmp_path: Path) -> None:
    both, report = Ends(tmp_path), DeviceReport(num_examples=1)
    both.send(1, "", {}, report)
    both.taken()
    assert both.wire.forgotten(PUSHED, {}) == ("big.weight",)
    state = both.send(2, "00001", {}, report.model_copy(update={"forgotten": ("big.weight",)}))
    assert torch.equal(both.taken(), state["sent/estimate/big.weight"])
    assert both.wire.forgotten(PUSHED, state) == ()


def test_a_coordinator_that_lost_its_estimate_refuses_to_add_to_nothing(tmp_path: Path) -> None:
    report = DeviceReport(num_examples=1)
    state = Ends(tmp_path / "a").send(1, "", {}, report)
    with pytest.raises(RefusedError, match=r"holds nothing of ann under '00001'.* whole folder") as refusal:
        Ends(tmp_path / "b").send(2, "00001", state, report)
    assert (refusal.value.status, refusal.value.reason) == (422, "no-estimate")


def test_a_round_that_is_closed_again_takes_the_same_updates(tmp_path: Path) -> None:
    both, report = Ends(tmp_path), DeviceReport(num_examples=1)
    state = both.send(1, "", {}, report)
    both.taken()
    both.send(2, "00001", state, report)
    first = both.taken()
    again = Ends(tmp_path)
    again.journal.open(2, states={"ann": "00001"})  # killed after it was remembered, before the commit
    assert torch.equal(again.taken(), first)
