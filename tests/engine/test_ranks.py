"""Several processes that simulate one job give what one process gives, and end together."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedmp.engine.ranked import share_out
from fedmp.engine.ranks import place_in_environment
from tests.engine import ranked_jobs

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120


def start(*arguments: str, ranks: int) -> list[subprocess.Popen[str]]:
    """A program in so many processes, told of each other as torchrun does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    source = Path(sys.modules["fedmp"].__file__ or "").parents[1]
    common = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
        "PYTHONPATH": os.pathsep.join([str(source), str(REPOSITORY)]),
    }
    group = (
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    )
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**common, **group, **({"RANK": str(rank)} if ranks > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each; none is left behind."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_jobs(folder: Path, names: str, *more: str, ranks: int) -> list[tuple[int, str]]:
    folder.mkdir(exist_ok=True)
    return finish(start("-m", "tests.engine.ranked_jobs", str(folder), names, *more, ranks=ranks))


def run_alone(folder: Path, names: list[str]) -> None:
    """The same in this process."""
    folder.mkdir()
    ranked_jobs.run(folder, names, None, resume=False)


def assert_same(folder: Path, alone: Path, name: str, *, tolerance: float) -> None:
    """Each rank's result is that of a process by itself."""
    expected = load_file(alone / f"{name}.0.safetensors")
    for rank in (0, 1):
        actual = load_file(folder / f"{name}.{rank}.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(
                actual[key], tensor, rtol=tolerance, atol=tolerance, msg=f"{name} {key}"
            )
    assert (folder / f"{name}.0.txt").read_text() == (folder / f"{name}.1.txt").read_text()


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 5))
def test_every_client_goes_to_one_rank_and_no_rank_has_much_more_than_another(
    amounts: list[int], num_ranks: int
) -> None:
    parts = share_out(amounts, num_ranks)
    assert sorted(place for part in parts for place in part) == list(range(len(amounts)))
    loads = [sum(amounts[place] for place in part) for part in parts]
    assert max(loads) - min(loads) <= max(amounts, default=0)


def test_a_process_by_itself_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert place_in_environment() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert place_in_environment() == (0, 1)  # a batch script, not a step of several tasks
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert place_in_environment() == (2, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert place_in_environment() == (1, 2)


# sums in double precision in another order differ by about 1e-16 of their size; three rounds and a division amplify
# that. Where each update travels by itself, it is the very one that one process makes.
TOLERANCES = {"mean": 1e-12, "median": 0.0, "federated evaluation": 1e-12, "batch norm": 1e-12}
TOLERANCES |= {"power of choice": 1e-12, "top-k": 0.0, "scaffold": 0.0}
NAMES = ("mean", "power of choice", "median")


def test_two_ranks_are_one_summed_up_or_update_by_update(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    both = run_jobs(together, ",".join(NAMES), ranks=2)
    assert [code for code, _ in both] == [0, 0], both
    run_alone(alone, list(NAMES))
    for name in NAMES:
        assert_same(together, alone, name, tolerance=TOLERANCES[name])
        assert not (together / f"unused {name} 1").exists()
        rows = (together / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["round"] for row in rows] == [1, 2, 3]


@pytest.mark.slow
def test_two_ranks_are_one_whatever_the_clients_keep_and_send(tmp_path: Path) -> None:
    names = ["federated evaluation", "batch norm", "top-k", "scaffold"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    both = run_jobs(together, ",".join(names), ranks=2)
    assert [code for code, _ in both] == [0, 0], both
    run_alone(alone, names)
    for name in names:
        assert_same(together, alone, name, tolerance=TOLERANCES[name])


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    for more in (("2",), ("3", "resume")):
        done = run_jobs(together, "scaffold,mean", *more, ranks=2)
        assert [code for code, _ in done] == [0, 0], done
    run_alone(alone, ["scaffold", "mean"])
    assert_same(together, alone, "scaffold", tolerance=0.0)
    assert_same(together, alone, "mean", tolerance=1e-12)


@pytest.mark.slow
def test_a_client_that_fails_at_a_rank_ends_all_with_its_message(tmp_path: Path) -> None:
    done = run_jobs(tmp_path / "out", "poisoned", ranks=2)
    assert [code for code, _ in done] == [2, 2], done
    assert all("the loss is nan at client" in out or "the loss is inf at client" in out for _, out in done), (
        done
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_with_a_message(tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    processes = start("-m", "tests.engine.ranked_jobs", str(folder), "mean", "1000000", ranks=2)
    lines = processes[0].stdout
    assert lines is not None
    assert any("RoundFinished" in line for line in lines)  # reads up to the first
    processes[victim].send_signal(signal.SIGKILL)
    began_s = time.monotonic()
    code, out = finish(processes)[1 - victim]
    assert time.monotonic() - began_s < 30
    assert code == 2, out
    assert "lost" in out
    assert "resume=DIR" in out


def torchrun(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command line in two processes."""
    source = Path(sys.modules["fedmp"].__file__ or "").parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = "simulate experiment=none topology=population topology.clients.count=6 split=iid model=mlp rounds=2"
    return subprocess.run(
        [*command, "-m", "fedmp", *job.split(), f"run_dir={folder / 'run'}", *more],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.slow
def test_torchrun_runs_the_command_line_and_one_rank_speaks(tmp_path: Path) -> None:
    out = torchrun(tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("round 2/2") == 1
    assert "of each of 2 processes" in out.stdout
    assert json.loads((tmp_path / "run/summary.json").read_text())["rounds"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("attempt", range(3))
def test_each_rank_ends_with_its_message_and_code_though_torchrun_ends_all(
    tmp_path: Path, attempt: int, rank: int
) -> None:
    rate = f"learning_rate._target_=tests.engine.ranked_jobs.FailsAt +learning_rate.rank={rank}"
    out = torchrun(tmp_path, *rate.split(), "rounds=9", "batch_size=100")
    assert out.returncode == 1
    assert re.findall(r"exitcode +: (-?\d+)", out.stderr) == ["2", "2"], out.stderr
    said = [line for line in out.stderr.splitlines() if line.startswith("fedmp: error: ")]
    assert len(said) == 2
    assert all("no such luck" in line for line in said), out.stderr
