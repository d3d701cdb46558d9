"""What `import fedmp` promises."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fedmp
import fedmp.errors

PROMISED = {
    *(
        "Centralized",
        "Chain",
        "Client",
        "CrossEntropy",
        "CutRules",
        "Device",
        "FedmpError",
        "Job",
        "Link",
        "Links",
        "MeanLoss",
    ),
    *("Plan", "Result", "Topology", "__version__", "merge", "partition", "run_stages", "split"),
}


def test_the_public_names_are_those_that_were_promised() -> None:
    """A name that goes, or comes, is a change for users: say so in CHANGELOG.md."""
    assert set(fedmp.__all__) == set(dir(fedmp)) == PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(fedmp, name)
    if name != "__version__":
        assert inspect.getdoc(found)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedmp' has no attribute 'parttion'"):
        fedmp.parttion  # noqa: B018


def test_importing_fedmp_imports_neither_torch_nor_hydra() -> None:
    code = "import fedmp, sys; print([m for m in ('torch', 'hydra', 'fastapi', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


HEAVY = (
    "sympy torch._dynamo torch._inductor torch.onnx matplotlib PIL scipy sklearn pandas fastapi uvicorn starlette "
    "httpx cryptography"
)
FIRST_ROUND = f"""
import sys
import fedmp.cli, fedmp.config
import torch
from fedmp import Job, Topology
from fedmp.records import RoundFinished

heavy = {HEAVY.split()!r}

def observe(event):
    if isinstance(event, RoundFinished):
        print(sorted(name for name in heavy if name in sys.modules))

x, y = torch.randn(8, 4), torch.arange(8) % 2
Job(
    model=torch.nn.Linear(4, 2), topology=Topology(clients=dict(count=4, devices=1)), data=(x, y, x, y), rounds=1
).run("simulate", run_dir=sys.argv[1], observe=observe)
"""


def test_a_simulations_first_round_has_imported_nothing_that_takes_long_but_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FIRST_ROUND, str(tmp_path / "run")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_version_is_that_of_the_package() -> None:
    try:
        installed = importlib.metadata.version("fedmp")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
        installed = next(
            line.split('"')[1] for line in pyproject.read_text().splitlines() if line.startswith("version")
        )
    assert fedmp.__version__ == installed


def test_every_error_is_a_fedmp_error_and_in_the_drawn_tree() -> None:
    drawn = fedmp.errors.__doc__ or ""
    for name in fedmp.errors.__all__:
        assert issubclass(getattr(fedmp.errors, name), fedmp.FedmpError)
        assert name in drawn


def test_a_model_is_partitioned_split_run_and_merged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(6, 8)
    devices = [fedmp.Device("a"), fedmp.Device("b")]
    plan = fedmp.partition(model, (x,), devices=devices, partitioner="uniform", num_microbatches=2)
    stages = fedmp.split(model, plan)
    assert len(stages) == 2
    assert torch.equal(fedmp.run_stages(stages, x), model(x))
    merged = fedmp.merge([stage.state_dict() for stage in stages])
    assert merged.keys() == model.state_dict().keys()


def test_a_job_runs_in_a_few_lines(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
    job = fedmp.Job(
        model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        topology=fedmp.Topology(clients=[fedmp.Client(name="a", devices=(fedmp.Device("d"),))]),
        data=(x, y, x, y),
        rounds=2,
    )
    result = job.run(engine="simulate", run_dir=tmp_path / "run", observe=lambda _: None)
    assert len(result.history) == 2
    assert not result.model.training
    assert result.model(x).shape == (60, 3)
    assert result.summary.clients == 1


def test_a_job_refuses_counts_below_one() -> None:
    topology = fedmp.Topology(clients=[fedmp.Client(name="a", devices=1)])
    for field in ("rounds", "batch_size", "num_microbatches"):
        with pytest.raises(fedmp.FedmpError, match=f"{field} is 0; it must be at least 1"):
            fedmp.Job(
                model=nn.Linear(1, 1), topology=topology, data=([[0.0]], [0], [[0.0]], [0]), **{field: 0}
            )


def test_an_engine_that_does_not_exist_is_named() -> None:
    topology = fedmp.Topology(clients=[fedmp.Client(name="a", devices=1)])
    job = fedmp.Job(model=nn.Linear(1, 1), topology=topology, data=([[0.0]], [0], [[0.0]], [0]))
    with pytest.raises(fedmp.FedmpError, match="no engine is called 'lokal'; there are local, simulate"):
        job.run(engine="lokal")
