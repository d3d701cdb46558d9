"""Strategies in whole runs: stages are cut anyhow, devices are lost, runs are resumed, and nothing changes."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmp import Job, Result
from fedmp import strategy as s
from fedmp.engine.local import LocalEngine
from fedmp.errors import ConfigError, ResumeError
from fedmp.records import Fault
from tests.support.deployment import Deployment, ends
from tests.support.jobs import TINY_CNN, TINY_MLP, assert_same, images, run, sgd, tiny_job, topology, weights

# float32, another order of summation (one thread or two) moves weights in the 7th digit
FLOAT32 = {"rtol": 1e-4, "atol": 2e-6}
QUICK = LocalEngine(silence_timeout_s=2, transfer_timeout_s=3)
ADAMW = partial(torch.optim.AdamW, lr=0.01)

STRATEGIES: dict[str, s.Strategy] = {
    "fedavg": s.FedAvg(local_steps=2, fraction=0.7, effort=s.Stragglers(fraction=0.5)),
    "fedprox": s.FedProx(mu=0.1),
    "scaffold": s.Scaffold(local_steps=2, fraction=0.7),
    "fednova": s.FedNova(effort=s.Stragglers(fraction=0.5)),
    "feddyn": s.FedDyn(local_steps=2),
    "q-fedavg": s.QFedAvg(local_steps=2),
    "fedavgm": s.FedAvgM(local_steps=2),
    "fedadagrad": s.FedAdagrad(local_steps=2),
    "fedadam": s.FedAdam(local_steps=2),
    "fedyogi": s.FedYogi(local_steps=2),
    "diloco": s.DiLoCo(local_steps=2),
    "streaming": s.StreamingDiLoCo(local_steps=2),
    "streaming, not overlapped": s.StreamingDiLoCo(local_steps=2, overlap=False, strided=False, fragments=2),
    "fedbn": s.FedBN(local_steps=2),
    "own head": s.FedAvg(local_steps=2, keep_local=("head.*",)),
    "power of choice": s.FedAvg(local_steps=2, fraction=0.5, selection=s.PowerOfChoice(num_candidates=2)),
}
KEPT = ("scaffold", "feddyn", "fedyogi", "diloco", "streaming", "fedbn", "power of choice")


def in_turn(quick: tuple[str, ...]) -> list[Any]:
    """All strategies; those that are not quick in the slow suite."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in STRATEGIES]


def job(name: str, **changes: Any) -> Job:
    """Three clients whose models are cut over two, three and one devices."""
    settings: dict[str, Any] = {
        "model": TINY_CNN if name == "fedbn" else TINY_MLP,
        "topology": topology(2, 3, 1),
        "data": images(60),
        "strategy": STRATEGIES[name],
        "optimizer": ADAMW if name in ("diloco", "streaming") else sgd(0.05),
        "rounds": 3,
    }
    return tiny_job(**{**settings, **changes})


@pytest.mark.parametrize("name", in_turn(("streaming", "fedbn")))
def test_clients_with_unlike_plans_come_to_the_model_of_whole_ones(name: str, tmp_path: Path) -> None:
    simulated, real = run(job(name), tmp_path / "simulate"), run(job(name), tmp_path / "local", "local")
    assert_same(weights(real), weights(simulated), **FLOAT32)
    for ours, theirs in zip(real.history, simulated.history, strict=True):
        assert ours.clients == theirs.clients
        assert ours.num_examples == theirs.num_examples
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)
        assert ours.federated_accuracy == pytest.approx(theirs.federated_accuracy)


@pytest.mark.parametrize("name", in_turn(("scaffold", "fedbn")))
def test_a_simulated_run_resumed_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    _check_resume(name, "simulate", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_local_run_resumed_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    _check_resume(name, "local", tmp_path)


def _check_resume(name: str, engine: str, folder: Path) -> None:
    whole = run(job(name, rounds=4), folder / "whole", engine)
    run(job(name, rounds=2), folder / "parts", engine)
    resumed = run(job(name, rounds=4), folder / "parts", engine, resume=True)
    assert_same(weights(resumed), weights(whole))
    assert [record.clients for record in resumed.history] == [record.clients for record in whole.history]


def disturbed(name: str, folder: Path, engine: LocalEngine, *faults: Fault) -> Result:
    return replace(job(name), faults=faults).run(engine, run_dir=folder / "run", observe=lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_a_device_that_is_killed_goes_on_with_what_it_kept(name: str, tmp_path: Path) -> None:
    undisturbed = weights(run(job(name), tmp_path / "undisturbed", "local"))
    fault = Fault(device="c1/d1", round=3, kind="kill", phase="backward", microbatch=1)
    assert_same(weights(disturbed(name, tmp_path, QUICK, fault)), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", "diloco", "streaming", "fedbn"])
def test_a_client_planned_anew_goes_on_with_what_its_devices_kept(name: str, tmp_path: Path) -> None:
    expected = weights(run(job(name), tmp_path / "expected"))
    fault = Fault(device="c1/d1", round=3, kind="kill", phase="between", step=0)
    once = QUICK.model_copy(update={"restarts": 0})
    assert_same(weights(disturbed(name, tmp_path, once, fault)), expected, **FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", "streaming", "fedbn"])
def test_deployed_devices_go_on_with_what_is_on_their_own_disks(name: str, tmp_path: Path) -> None:
    """A device is killed in round 3, and the coordinator before it commits round 2."""
    made = job(name, topology=topology(2, 1))
    expected = weights(run(made, tmp_path / "expected"))
    fault = Fault(device="c0/d1", round=3, phase="backward", microbatch=1, kind="kill")
    with Deployment(tmp_path, made) as federation:
        others = [own_disk(federation, client, "d0") for client in ("c0", "c1")]
        doomed = own_disk(federation, "c0", "d1", job=replace(made, faults=(fault,)))
        assert ends(federation.coordinator(kill_at="before the commit", nth=2)) == -signal.SIGKILL
        coordinator = federation.coordinator()
        assert ends(doomed) == -signal.SIGKILL
        again = own_disk(federation, "c0", "d1")
        assert [ends(process) for process in (coordinator, again, *others)] == [0] * 4
        final = federation.final_state()
        assert_same(final, {name: expected[name] for name in final}, **FLOAT32)
    assert len(list(tmp_path.glob("disk-*/*/*/0000*/*.safetensors"))) >= 3


def own_disk(federation: Deployment, client: str, device: str, **options: Any) -> BaseProcess:
    federation._more_settings["state_folder"] = federation.folder / f"disk-{client}-{device}"
    return federation.device(client, device, **options)


def test_nothing_is_written_where_nothing_is_kept(tmp_path: Path) -> None:
    run(job("fedavg", rounds=1), tmp_path / "run")
    assert not (tmp_path / "run" / "state").exists()


def test_a_run_is_not_resumed_with_another_strategys_state(tmp_path: Path) -> None:
    run(job("scaffold", rounds=1), tmp_path / "run")
    with pytest.raises(ResumeError, match=r"the checkpoint has state of the slots \['@control'\]"):
        run(job("feddyn", rounds=2), tmp_path / "run", resume=True)


def test_fedbn_wants_batch_normalisation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FedBN leaves batch normalisation at the clients"):
        run(job("fedbn", model=TINY_MLP), tmp_path / "run")


def test_fragments_move_their_share_of_the_bytes_and_come_round(tmp_path: Path) -> None:
    whole = run(job("diloco", topology=topology(1), rounds=6), tmp_path / "whole").summary
    parts = run(job("streaming", topology=topology(1), rounds=6), tmp_path / "parts").summary
    # a body has a report and names besides its tensors, less than 1 KiB
    assert 0 <= parts.bytes_up - whole.bytes_up / 3 < 6 * 1024
    assert parts.bytes_down < whole.bytes_down / 2, "the first round's pull is of all"
