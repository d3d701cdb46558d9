"""The deployed engine: the same numbers as the local one, whatever happens to the coordinator in between."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from fedmp.cli import main
from fedmp.data import ArrayData, NoData, Own
from fedmp.engine.agreement import agreement_of, check_agreement
from fedmp.engine.deploy import DeployEngine
from fedmp.errors import ConfigError
from fedmp.identity import CredentialStore
from fedmp.models import MLP
from fedmp.records import Fault
from fedmp.report import RunDirectory
from fedmp.seeds import derive_seed
from tests.support.deployment import STEPS, Deployment, ends, eventually
from tests.support.jobs import assert_same, images, run, tiny_job, topology, weights

JOB = tiny_job(rounds=3, topology=topology(2, 1), data=images(60))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the local engine makes of the job."""
    return weights(run(JOB, tmp_path_factory.mktemp("undisturbed"), "local"))


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path, JOB) as deployment:
        yield deployment


def test_a_deployed_run_equals_a_local_one(
    federation: Deployment, undisturbed: dict[str, torch.Tensor]
) -> None:
    devices = federation.devices()  # which wait for their coordinator
    coordinator = federation.coordinator()
    assert [ends(process) for process in (coordinator, *devices)] == [0] * 4
    assert_same(federation.final_state(), undisturbed)
    rows = RunDirectory.create(federation.folder / "run").read_metrics()
    assert [row.num_examples for row in rows] == [60] * 3
    assert all(row.test_accuracy is not None for row in rows)


def check_kill(federation: Deployment, step: str, nth: int, expected: dict[str, torch.Tensor]) -> None:
    """Killed there, and started again by the same command, the coordinator ends as if nothing had been."""
    devices = federation.devices()
    assert ends(federation.coordinator(kill_at=step, nth=nth)) == -signal.SIGKILL
    assert ends(federation.coordinator()) == 0
    assert [ends(device) for device in devices] == [0] * 3
    assert_same(federation.final_state(), expected)
    rows = RunDirectory.create(federation.folder / "run").read_metrics()
    assert [row.round for row in rows] == [1, 2, 3]


SAMPLE = {("before the commit", 2)}


@pytest.mark.parametrize(
    ("step", "nth"),
    [
        pytest.param(step, nth, marks=() if (step, nth) in SAMPLE else pytest.mark.slow)
        for step, (_, method, _) in STEPS.items()
        # a round has three devices' updates, and two different stages and a whole model to hand out
        for nth in {
            "accept": (1, 4, 5, 6, 9),
            "reported": (4, 5, 6),
            "global_stage": (1, 4, 5),
            "stop": (1,),
        }.get(method, (1, 2, 3))
    ],
)
def test_a_coordinator_killed_anywhere_and_started_again_ends_as_if_nothing_had_been(
    federation: Deployment, undisturbed: dict[str, torch.Tensor], step: str, nth: int
) -> None:
    check_kill(federation, step, nth, undisturbed)


@pytest.mark.slow
def test_a_coordinator_killed_in_every_round_gets_there_in_the_end(
    federation: Deployment, undisturbed: dict[str, torch.Tensor]
) -> None:
    devices = federation.devices()
    for nth in (2, 2, 1, 3, 2):
        step = "after an update is in the journal, before it is acknowledged"
        assert ends(federation.coordinator(kill_at=step, nth=nth)) in (-signal.SIGKILL, 0)
    assert ends(federation.coordinator()) == 0
    assert [ends(device) for device in devices] == [0] * 3
    assert_same(federation.final_state(), undisturbed)


def test_sigterm_ends_the_coordinator_at_once_and_its_devices_wait_for_it(
    federation: Deployment, undisturbed: dict[str, torch.Tensor]
) -> None:
    """One device is missing, so the round is open for as long as we want."""
    first = [federation.device("c0", "d0"), federation.device("c1", "d0")]
    coordinator = federation.coordinator()
    with eventually() as waiting:
        while waiting():
            # it is in the journal a moment before it counts
            if list(federation.folder.glob("run/journal/round-00001/c1.0.safetensors")):
                ready = federation.get("/ready")
                if ready["reported"]:
                    break
    assert ready == {"round": 1, "state": "open", "clients": 2, "reported": 1}
    os.kill(coordinator.pid or 0, signal.SIGTERM)
    assert ends(coordinator, within_s=10) == 143
    again = federation.coordinator()
    last = federation.device("c0", "d1")
    assert [ends(process) for process in (again, *first, last)] == [0] * 4
    assert_same(federation.final_state(), undisturbed)


def test_a_deployed_device_that_is_killed_and_started_again_leaves_no_trace(
    federation: Deployment, undisturbed: dict[str, torch.Tensor]
) -> None:
    fault = Fault(device="c0/d1", round=2, phase="backward", microbatch=1, kind="kill")
    others = [federation.device("c0", "d0"), federation.device("c1", "d0")]
    coordinator = federation.coordinator()
    doomed = federation.device("c0", "d1", job=replace(JOB, faults=(fault,)))
    assert ends(doomed) == -signal.SIGKILL
    again = federation.device("c0", "d1")
    assert [ends(process) for process in (coordinator, again, *others)] == [0] * 4
    assert_same(federation.final_state(), undisturbed)


def test_each_client_may_have_data_of_its_own_and_the_coordinator_none(tmp_path: Path) -> None:
    """As it is meant: nobody ever holds all data. The pooled data with the same split give the same model."""
    data = JOB.source().load()
    rows = JOB.split.assign(data.train, 2, _split_seed(JOB.seed))
    shared = tiny_job(rounds=1, topology=topology(1, 1), data=images(60))
    expected = weights(run(shared, tmp_path / "pooled", "simulate"))
    blind = tiny_job(rounds=1, topology=topology(1, 1), data=NoData(shape=(1, 28, 28)), split=Own())
    with Deployment(tmp_path, blind) as federation:
        devices = []
        for client, own in zip(("c0", "c1"), rows, strict=True):
            inputs, targets = data.train.batch(own)
            mine = ArrayData(inputs, targets, inputs[:1], targets[:1])
            devices.append(federation.device(client, "d0", job=replace(blind, data=mine)))
        coordinator = federation.coordinator()
        assert [ends(process) for process in (coordinator, *devices)] == [0] * 3
        assert_same(federation.final_state(), expected, rtol=1e-5, atol=1e-6)
        assert RunDirectory.create(tmp_path / "run").read_metrics()[0].test_loss is None


def test_a_device_whose_config_differs_says_where_and_the_run_goes_on_without_it(
    federation: Deployment,
) -> None:
    federation.coordinator()
    wrong = federation.device("c0", "d0", config={"seed": 7})
    assert ends(wrong) == 2
    assert "they differ in seed (here 7)" in federation.last_words("c0", "d0")
    assert federation.get("/ready")["state"] == "open"


def test_a_device_whose_model_differs_says_so(
    federation: Deployment,
) -> None:
    federation.coordinator()
    other = tiny_job(model=partial(MLP, 784, (16, 11)), topology=JOB.topology, data=images(60))
    assert ends(federation.device("c0", "d0", job=other)) == 2
    assert "another graph than the coordinator's" in federation.last_words("c0", "d0")


def test_a_device_that_was_revoked_is_turned_away(
    federation: Deployment,
) -> None:
    CredentialStore(federation.folder / "federation" / "devices.json").revoke("c0", "d0")
    federation.coordinator()
    assert ends(federation.device("c0", "d0")) == 2
    assert "the credential of c0/d0 was revoked" in federation.last_words("c0", "d0")


class TestAgreement:
    """What all must have alike."""

    CONFIG: ClassVar[dict[str, Any]] = {
        "seed": 1,
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "run_dir": "here",
    }

    def test_equal_jobs_agree_wherever_they_run(self) -> None:
        check_agreement({**self.CONFIG, "run_dir": "there"}, agreement_of(self.CONFIG))

    def test_nothing_of_a_config_crosses_the_wire(self) -> None:
        sent = str(agreement_of(self.CONFIG))
        assert "torch" not in sent
        assert "0.1" not in sent

    def test_a_difference_is_named_with_the_value_here(self) -> None:
        other = {**self.CONFIG, "seed": 2, "optimizer": {"_target_": "torch.optim.SGD", "momentum": 0.9}}
        with pytest.raises(
            ConfigError,
            match=r"differ in optimizer\.lr \(not set here\), optimizer\.momentum \(here 0\.9\), seed \(here 2\)",
        ):
            check_agreement(other, agreement_of(self.CONFIG))


class TestOpenDoors:
    """What a coordinator refuses to start with."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        CredentialStore(tmp_path / "devices.json").enroll("c0", "d0")
        return tmp_path

    def test_beyond_this_machine_it_wants_tls_or_plain_words(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"listen on 0\.0\.0\.0 without TLS.* engine\.insecure=true"):
            DeployEngine(host="0.0.0.0", port=0, folder=folder).warm_up()
        DeployEngine(host="0.0.0.0", port=0, folder=folder, insecure=True).warm_up()
        DeployEngine(host="127.0.0.1", port=0, folder=folder).warm_up()

    def test_it_wants_somebody_to_be_enrolled(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no device is enrolled in .*devices\.json; .*`fedmp enroll"):
            DeployEngine(port=0, folder=tmp_path).warm_up()

    def test_a_certificate_that_is_not_there_is_named(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"certificate \(.*gone\.pem.*cannot be used"):
            DeployEngine(port=0, folder=folder, certificate=folder / "gone.pem").warm_up()


class TestCommands:
    """As an operator runs it."""

    CONFIGS = Path(__file__).resolve().parents[1] / "support" / "configs"

    def path(self) -> str:
        root = Path(__file__).resolve().parents[2]
        return os.pathsep.join([str(root / "src"), str(root)])

    def start(self, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fedmp", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": self.path(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @pytest.mark.slow
    def test_two_jobs_over_mutual_tls_with_json_logs_and_ranks(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        names = ["c0/d0", "c0/d1", "c1/d0", "c1/d1"]
        folder = ["--folder", str(tmp_path / "federation")]
        assert main(["certs", "127.0.0.1", *folder]) == 0
        assert (
            main(["enroll", *names, "--coordinator", f"https://127.0.0.1:{port}", "--mutual", *folder]) == 0
        )
        for rank, name in enumerate(names):
            made = tmp_path / "federation" / "credentials" / f"{name.replace('/', '.')}.json"
            made.rename(tmp_path / f"device.{rank}.json")
        job = ["--config-dir", str(self.CONFIGS), "--multirun", "experiment=tiny", "seed=1,2", "logs=json"]
        served = [f"engine.port={port}", "engine.mutual_tls=true", "hydra.sweep.dir=sweep"]
        processes = [
            self.start(tmp_path, "coordinator", *job, *served),
            *(
                self.start(tmp_path, "device", "--credentials", "device.{rank}.json", *job, RANK=str(rank))
                for rank in range(len(names))
            ),
        ]
        try:
            printed = [process.communicate(timeout=120)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [process.returncode for process in processes] == [0] * 5, printed
        events = [json.loads(line) for line in printed[0].splitlines() if line.startswith("{")]
        assert [event["event"] for event in events].count("run-finished") == 2
        for number, seed in enumerate((1, 2)):
            expected = _simulated(tmp_path / f"expected{seed}", self.CONFIGS, seed)
            state = load_file(
                tmp_path / "sweep" / str(number) / "checkpoints" / "round-00001" / "model.safetensors"
            )
            assert_same(state, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_torchrun_starts_the_devices_of_a_client(self, tmp_path: Path) -> None:
        """As docs/deployment.md has it, with both devices on one node."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        names = ["c0/d0", "c0/d1", "c1/d0", "c1/d1"]
        folder = ["--folder", str(tmp_path / "federation")]
        assert main(["enroll", *names, "--coordinator", f"http://127.0.0.1:{port}", *folder]) == 0
        for rank, name in enumerate(names):
            made = tmp_path / "federation" / "credentials" / f"{name.replace('/', '.')}.json"
            made.rename(tmp_path / f"device.{rank}.json")
        job = ["--config-dir", str(self.CONFIGS), "experiment=tiny", "seed=1"]
        coordinator = self.start(tmp_path, "coordinator", *job, f"engine.port={port}", "run_dir=run")
        launch = ["--nnodes", "1", "--nproc-per-node", "4", "--master-port", "0", "--no-python"]
        devices = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *launch),
                *(sys.executable, "-m", "fedmp", "device", "--credentials", "device.{rank}.json", *job),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": self.path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            printed = [process.communicate(timeout=200)[0] for process in (coordinator, devices)]
        finally:
            for process in (coordinator, devices):
                process.terminate()
                process.wait()
        assert [coordinator.returncode, devices.returncode] == [0, 0], printed
        state = load_file(tmp_path / "run" / "checkpoints" / "round-00001" / "model.safetensors")
        assert_same(state, _simulated(tmp_path / "expected", self.CONFIGS, 1), rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_the_slurm_script_gives_each_task_its_own_credentials(self, tmp_path: Path) -> None:
        """The script of docs/deployment.md, with an `srun` that starts two tasks as SLURM would."""
        text = (Path(__file__).resolve().parents[2] / "docs" / "deployment.md").read_text()
        configs = tmp_path / "my_configs" / "topology"
        configs.mkdir(parents=True)
        (configs / "hospitals.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])
        script = tmp_path / "job.sh"
        script.write_text(re.findall(r"```bash\n(#!.*?)```", text, flags=re.DOTALL)[0])
        (tmp_path / "srun").write_text('#!/bin/bash\nfor task in 0 1; do SLURM_PROCID=$task "$@"; done\n')
        (tmp_path / "fedmp").write_text(f'#!/bin/bash\nexec {sys.executable} -m fedmp "$@"\n')
        for name in ("srun", "fedmp"):
            (tmp_path / name).chmod(0o755)
        environment = {
            **os.environ,
            "PYTHONPATH": self.path(),
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        }
        command = ["bash", str(script)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if "credentials" in line]
        assert [re.search(r"device\.\d\.json", line)[0] for line in said] == [
            "device.0.json",
            "device.1.json",
        ]  # type: ignore[index]

    def test_a_rank_that_nobody_set_is_named(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("SLURM_PROCID", raising=False)
        assert main(["device", "--credentials", "device.{rank}.json"]) == 2
        assert "neither RANK nor SLURM_PROCID is set" in capsys.readouterr().err


def _simulated(folder: Path, configs: Path, seed: int) -> dict[str, torch.Tensor]:
    assert (
        main(
            ["simulate", "--config-dir", str(configs), "experiment=tiny", f"seed={seed}", f"run_dir={folder}"]
        )
        == 0
    )
    return load_file(folder / "checkpoints" / "round-00001" / "model.safetensors")


def _split_seed(seed: int) -> int:
    return derive_seed(seed, "split") % 2**32
