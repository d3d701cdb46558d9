"""Examples and documentation do what they say: every script and every Python block is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_script(arguments: list[str], folder: Path) -> str:
    """Run Python in an empty folder, as a user would; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_training_example_trains_its_own_model_over_processes(tmp_path: Path) -> None:
    printed = run_script([str(ROOT / "examples" / "train.py")], tmp_path)
    accuracy = re.search(r"accuracy (\d+\.\d)%", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 60
    assert list(tmp_path.glob("runs/*/summary.json"))


def test_the_training_example_is_short() -> None:
    assert len((ROOT / "examples" / "train.py").read_text().splitlines()) < 40


def test_the_custom_strategy_example_keeps_the_contract_and_learns(tmp_path: Path) -> None:
    printed = run_script([str(ROOT / "examples" / "custom_strategy.py")], tmp_path)
    assert float(printed.rsplit("accuracy", 1)[1].strip(" %\n")) > 60


def test_the_custom_partitioner_example_beats_uniform(tmp_path: Path) -> None:
    run_script([str(ROOT / "examples" / "custom_partitioner.py")], tmp_path)


@pytest.mark.parametrize("name", ["README.md", "docs/pipeline.md"])
def test_the_python_blocks_of_the_documentation_run(name: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert blocks
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(blocks))
    run_script(["-W", "ignore", str(script)], tmp_path)


def test_every_test_that_the_table_of_failures_names_exists() -> None:
    """A row without a test that backs it is only a promise."""
    table = (ROOT / "docs" / "failures.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", table))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", path.read_text())
    }
    assert named
    assert named <= there, sorted(named - there)
    rows = [line for line in table.split("## What happens when")[1].splitlines() if line.startswith("| ")]
    backed = [row for row in rows[1:] if "test_" in row.split("|")[-2] or "the same" in row.split("|")[-2]]
    assert backed == [row for row in rows[1:] if not row.startswith(("|---", "| field", "| `"))]
