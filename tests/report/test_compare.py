"""Comparing runs: what is read, how runs are told apart, and what is written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedmp.errors import ConfigError
from fedmp.records import RoundRecord
from fedmp.report.compare import comparison_table, find_runs, read_runs, write_comparison
from fedmp.report.run_directory import RunDirectory


def leave_run(path: Path, accuracies: list[float | None], *, round_s: float = 1.0, **config: Any) -> Path:
    """A run directory with these rounds; each moves 100 bytes."""
    directory = RunDirectory.create(path)
    directory.write_config(config)
    for number, accuracy in enumerate(accuracies, start=1):
        directory.append_metrics(
            RoundRecord(
                round=number,
                clients=("a", "b"),
                num_examples=10,
                train_loss=1.0,
                test_accuracy=accuracy,
                bytes_up=50,
                bytes_down=30,
                pipeline_bytes=20,
                wall_s=0.5,
                simulated_s=round_s,
            )
        )
    return path


def test_a_row_sums_up_a_run_and_says_when_it_reached_what_all_reach(tmp_path: Path) -> None:
    slow = leave_run(tmp_path / "slow", [0.2, 0.4, 0.6], round_s=3.0, optimizer={"lr": 0.1})
    fast = leave_run(tmp_path / "fast", [0.6, 0.7, 0.65, 0.8], round_s=1.5, optimizer={"lr": 0.2})
    first, second = read_runs([slow, fast])
    assert (first.label, second.label) == ("optimizer.lr=0.1", "optimizer.lr=0.2")
    assert (first.rounds, first.clients, first.devices, first.accuracy) == (3, 2, None, 0.6)
    assert (second.accuracy, second.best_accuracy) == (0.8, 0.8)
    assert (first.bytes_moved, first.simulated_s, first.wall_s) == (300, 9.0, 1.5)
    assert {first.goal_accuracy, second.goal_accuracy} == {0.6}
    assert (first.goal_round, first.goal_bytes, first.goal_s) == (3, 300, 9.0)
    assert (second.goal_round, second.goal_bytes, second.goal_s) == (1, 100, 1.5)


@pytest.mark.parametrize(
    ("configs", "labels"),
    [
        ([{"seed": 0}, {"seed": 1}], ["seed=0", "seed=1"]),
        (
            [{"topology": {"name": "x", "clients": [1]}}, {"topology": {"name": "y", "clients": [2]}}],
            ["topology=x", "topology=y"],
        ),
        (
            [{"strategy": {"_target_": "a.b.FedAvg"}}, {"strategy": {"_target_": "a.FedProx", "mu": 1}}],
            ["strategy=FedAvg", "strategy=FedProx"],
        ),
        ([{"run_dir": "x"}, {"run_dir": "y"}], ["r0", "r1"]),
        ([{"seed": 0}, {"seed": 1}, {"seed": 1}], ["seed=0", "seed=1 (r1)", "seed=1 (r2)"]),
    ],
)
def test_runs_are_named_after_what_sets_them_apart(
    tmp_path: Path, configs: list[dict[str, Any]], labels: list[str]
) -> None:
    paths = [leave_run(tmp_path / f"r{n}", [0.5], **config) for n, config in enumerate(configs)]
    assert [run.label for run in read_runs(paths)] == labels


def test_a_sweep_stands_for_its_runs_in_their_order(tmp_path: Path) -> None:
    paths = [leave_run(tmp_path / "sweep" / str(number), [0.5]) for number in range(11)]
    alone = leave_run(tmp_path / "alone", [0.5])
    assert find_runs([tmp_path / "sweep", alone, paths[3]]) == [*paths, alone]


def test_what_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        find_runs([tmp_path])
    RunDirectory.create(tmp_path / "empty").truncate_metrics(0)
    with pytest.raises(ConfigError, match="has not committed a round yet"):
        read_runs(find_runs([tmp_path / "empty"]))


def test_the_files_lie_in_the_folder_of_the_runs_and_hold_every_figure(tmp_path: Path) -> None:
    runs = read_runs([leave_run(tmp_path / name, [0.5, 0.7], seed=name) for name in "ab"])
    written = write_comparison(runs)
    assert written == (tmp_path / "comparison.json", tmp_path / "comparison.png")
    rows = json.loads(written[0].read_text())
    assert [row["label"] for row in rows] == ["seed=a", "seed=b"]
    assert [row["simulated_s"] for row in rows] == [2.0, 2.0]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert write_comparison(runs, tmp_path / "out")[0] == tmp_path / "out" / "comparison.json"


@pytest.mark.parametrize("accuracies", [[None, None], [0.1], [0.3, None, 0.9]])
def test_any_history_can_be_drawn_and_printed(tmp_path: Path, accuracies: list[float | None]) -> None:
    many = [leave_run(tmp_path / str(number), accuracies, seed=number) for number in range(12)]
    long = leave_run(tmp_path / "long", accuracies, round_s=1e5, seed=13)
    runs = read_runs([*many, long])
    write_comparison(runs)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(runs))
    text = console.export_text()
    assert all(f"seed={number}" in text for number in range(12))
    assert "…" not in text
