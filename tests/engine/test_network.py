"""Networks that are slow, lossy or cut: machines of their own, TLS between them, the same model in the end.

Skipped with a message where network namespaces cannot be made; everything stays inside those made here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedmp import Topology
from fedmp.cli import main
from fedmp.strategy import FedAvg
from tests.support.deployment import Deployment, ends, eventually
from tests.support.jobs import assert_same, images, run, tiny_job, weights
from tests.support.machines import Machines

HOSPITALS = Topology(clients=[{"name": "hospital", "devices": [{"name": "north"}, {"name": "south"}]}])
JOB = tiny_job(rounds=3, topology=HOSPITALS, data=images(60))


@pytest.fixture
def machines() -> Iterator[Machines]:
    with Machines(["fed", "north", "south"]) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights(run(JOB, tmp_path_factory.mktemp("undisturbed"), "local"))


def test_two_machines_train_over_tls_on_a_slow_network(
    machines: Machines, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    machines.delay_s = 0.005
    with Deployment(tmp_path, JOB, machines=machines) as federation:
        processes = [federation.coordinator(), *federation.devices()]
        assert [ends(process) for process in processes] == [0] * 3
        assert_same(federation.final_state(), undisturbed)


@pytest.mark.slow
def test_packets_that_are_lost_and_late_leave_no_trace_in_the_model(
    machines: Machines, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    machines.delay_s, machines.loss = 0.03, 0.03
    with Deployment(tmp_path, JOB, machines=machines) as federation:
        processes = [federation.coordinator(), *federation.devices()]
        assert [ends(process, within_s=150) for process in processes] == [0] * 3
        assert_same(federation.final_state(), undisturbed)


LONG = replace(JOB, strategy=FedAvg(local_steps=60), rounds=2)


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights(run(LONG, tmp_path_factory.mktemp("undisturbed"), "local"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "seconds"),
    [
        ("north", "south", 2.0),  # shorter than any deadline: TCP takes it up again
        ("north", "south", 8.0),  # longer than a transfer may take: the pipeline comes up anew
        ("fed", "north", 6.0),
        ("fed", "south", 6.0),
    ],
)
def test_a_network_that_is_cut_and_heals_leaves_no_trace_in_the_model(
    first: str,
    second: str,
    seconds: float,
    machines: Machines,
    undisturbed_long: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    machines.delay_s = 0.001
    with Deployment(
        tmp_path, LONG, machines=machines, settings={"transfer_timeout_s": 4}, engine={"absence_s": 60}
    ) as federation:
        processes = [federation.coordinator(), *federation.devices()]
        first_update = tmp_path / "run" / "journal"
        with eventually() as waiting:
            while waiting():
                if list(first_update.glob("round-00001/global-*")):
                    break
        with machines.apart(first, second):
            time.sleep(seconds)
        assert [ends(process, within_s=120) for process in processes] == [0] * 3
        assert_same(federation.final_state(), undisturbed_long)


@pytest.mark.slow
def test_the_recipe_for_two_machines_works_as_it_is_written(machines: Machines, tmp_path: Path) -> None:
    """docs/deployment.md, command by command, with a smaller job."""
    configs = tmp_path / "my_configs"
    (configs / "topology").mkdir(parents=True)
    (configs / "topology" / "hospitals.yaml").write_text(
        "name: hospitals\nclients:\n  - name: hospital\n    devices: [{name: north, flops_per_s: 4e11, "
        "memory_bytes: 8 GiB}, {name: south, flops_per_s: 2e11, memory_bytes: 4 GiB}]\n"
    )
    fed = machines.address("fed")
    folder = ["--folder", str(tmp_path / "federation")]
    assert main(["certs", fed, *folder]) == 0
    url = f"https://{fed}:8470"
    assert main(["enroll", "hospital/north", "hospital/south", "--coordinator", url, *folder]) == 0

    job = ["--config-dir", str(configs), "experiment=none", "topology=hospitals", "rounds=2"]
    job += [
        "optimizer.lr=0.002"
    ]  # a hundred large steps blow up the last digits, which depend on the threads
    blind = ["data=none", "data.shape=[1,28,28]"]
    own = ["data=fashion_mnist_excerpt", "split=own"]
    commands = {
        "fed": ["coordinator", *job, *blind, "run_dir=out/run1", "engine.host=0.0.0.0"],
        **{
            name: [
                *("device", "--credentials", f"federation/credentials/hospital.{name}.json"),
                *(*job, *own, f"device.host={machines.address(name)}"),
            ]
            for name in ("north", "south")
        },
    }
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", machines.namespace(name), sys.executable, "-m", "fedmp", *command],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in commands.items()
    ]
    try:
        printed = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0] * 3, printed
    assert f"listening on {url.replace(fed, '0.0.0.0')}" in printed[0]

    expected = tmp_path / "expected"
    assert main(["simulate", *job, *own, f"run_dir={expected}", "quiet=true"]) == 0
    model = Path("checkpoints") / "round-00002" / "model.safetensors"
    assert_same(
        load_file(tmp_path / "out" / "run1" / model), load_file(expected / model), rtol=1e-4, atol=1e-5
    )
