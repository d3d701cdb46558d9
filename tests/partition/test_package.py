"""What surrounds the planners: the package's door, the configs, the documentation and the example."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fedmp.partition import Partitioner, check_partitioner

ROOT = Path(__file__).parents[2]


def test_planning_needs_no_torch() -> None:
    command = "import sys, fedmp.partition; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=60)


def test_the_package_is_callable_and_its_classes_are_found_by_their_dotted_path() -> None:
    import fedmp.partition

    assert callable(fedmp.partition)
    assert isinstance(fedmp.partition.Exact(), Partitioner)


@pytest.mark.parametrize("name", ["uniform", "balanced", "exact"])
def test_every_config_names_a_partitioner(name: str) -> None:
    text = (ROOT / "configs" / "partitioner" / f"{name}.yaml").read_text()
    found = re.fullmatch(r"_target_: (\S+)\.(\w+)\n", text)
    assert found
    partitioner = getattr(importlib.import_module(found[1]), found[2])()
    assert isinstance(partitioner, Partitioner)
    assert type(partitioner).__name__.lower() == name


def test_the_code_in_the_documentation_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "partitioners.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    exec("\n".join(blocks), {})


def test_partition_takes_leaves_rules_and_measured_costs() -> None:
    import torch
    from torch import nn

    import fedmp
    from tests.support.plugins import Branching

    model = nn.Sequential(nn.Linear(784, 784), Branching(), nn.Linear(10, 10))
    devices = [fedmp.Device("a"), fedmp.Device("b")]
    plan = fedmp.partition(
        model,
        (torch.zeros(8, 784),),
        devices=devices,
        partitioner="exact",
        costs="measured",
        leaves=("1",),
        cut_rules=fedmp.CutRules(force=("1",), devices={"0": "b"}),
    )
    assert [stage.device for stage in plan.stages] == ["b", "a"]
    assert plan.cuts == (1,)
    x = torch.randn(5, 784)
    assert torch.equal(fedmp.run_stages(fedmp.split(model, plan), x), model(x))


def test_the_example_keeps_the_contract_and_beats_uniform(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "custom_partitioner.py"))
    check_partitioner(example["FastestFirst"]())
    example["main"]()
    seconds = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert seconds["exact"] <= seconds["mine"] < 0.5 * seconds["uniform"]
