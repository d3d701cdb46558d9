"""The command line: what it does, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from fedmp import __version__
from fedmp.cli import main
from fedmp.records import Plan, Summary

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = Path(__file__).parent / "support" / "configs"
TINY = ("--config-dir", str(CONFIGS), "experiment=tiny")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def fedmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> Answer:
        capfd.readouterr()
        code = main(arguments)
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return run


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The command line as a process of its own."""
    path = os.pathsep.join([str(Path(sys.modules["fedmp"].__file__ or "").parents[1]), str(REPOSITORY)])
    return subprocess.Popen(
        [sys.executable, "-m", "fedmp", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # as a terminal starts it, whatever a shell or nohup made this process ignore
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def assert_one_line(answer: Answer, pattern: str) -> None:
    """Exit code 2 and one line on standard error that says what is wrong; no traceback."""
    assert answer.code == 2, answer
    assert re.fullmatch(r"fedmp: error: [^\n]+\n", answer.err), answer.err
    assert re.search(pattern, answer.err), answer.err
    assert "Traceback" not in answer.out + answer.err


# what works


def test_version(fedmp: Command) -> None:
    assert fedmp("--version") == Answer(0, f"fedmp {__version__}\n", "")


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_names_commands_groups_and_choices(fedmp: Command, flag: str) -> None:
    answer = fedmp(flag)
    assert (answer.code, answer.err) == (0, "")
    for word in (
        "fedmp run",
        "fedmp simulate",
        "fedmp plan",
        "--multirun",
        "resume=DIR",
        "three_labs",
        "gpipe",
    ):
        assert word in answer.out
    assert "{" not in answer.out.replace("{name", "")


def test_help_shows_a_users_own_choices_too(fedmp: Command) -> None:
    assert "pair" in fedmp("--help", "--config-dir", str(CONFIGS)).out


def test_cfg_job_prints_the_composed_config_and_does_not_run_it(fedmp: Command, tmp_path: Path) -> None:
    answer = fedmp("run", *TINY, "rounds=7", "optimizer.weight_decay=0.1", "--cfg", "job")
    assert answer.code == 0
    assert "rounds: 7" in answer.out
    assert "weight_decay: 0.1" in answer.out
    assert "hydra:" not in answer.out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run over real processes, started as a user would, with its output in a pipe."""
    folder = tmp_path_factory.mktemp("finished")
    process = start("run", *TINY, "engine=local", "rounds=2", "run_dir=out/try1", cwd=folder)
    out, err = process.communicate(timeout=120)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return folder / "out" / "try1", done


def test_a_run_leaves_its_run_directory(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, process = finished
    assert process.returncode == 0, process.stderr
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.json", "plan.json", "metrics.jsonl", "summary.json", "checkpoints", "pictures"}
    summary = Summary.model_validate_json((run_dir / "summary.json").read_text())
    assert (summary.engine, summary.rounds, summary.clients, summary.devices) == ("local", 2, 2, 4)
    assert summary.bytes_up > 0
    assert summary.bytes_down > 0
    assert summary.pipeline_bytes > 0
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((run_dir / "config.json").read_text())["model"]["hidden"] == [16, 12]
    assert not list(run_dir.rglob("*.part"))


def test_output_in_a_pipe_is_plain_and_nothing_is_on_standard_error(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, process = finished
    assert process.stderr == ""
    assert "\x1b" not in process.stdout
    assert "\r" not in process.stdout
    assert "round 2" in process.stdout.lower() or "2/2" in process.stdout


def test_a_finished_run_is_resumed_for_more_rounds(
    fedmp: Command, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    run_dir, _ = finished
    assert_one_line(
        fedmp("run", *TINY, "rounds=2", f"resume={run_dir}"), "has finished 2 rounds; ask for more"
    )
    other = fedmp("run", *TINY, "rounds=3", f"resume={run_dir}", "model.hidden=[8]")
    assert_one_line(other, "trained another model .* resume with the config it began with")
    again = fedmp("run", *TINY, "rounds=3", f"run_dir={run_dir}")
    assert_one_line(again, f"holds a run already; go on with it by resume={run_dir}")
    assert fedmp("run", *TINY, "rounds=3", f"resume={run_dir}").code == 0
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3


def test_simulate_is_short_for_the_simulating_engine(fedmp: Command, tmp_path: Path) -> None:
    assert fedmp("simulate", *TINY, "run_dir=run").code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["engine"] == "simulate"


def test_quiet_prints_nothing(fedmp: Command) -> None:
    assert fedmp("run", *TINY, "quiet=true", "run_dir=run") == Answer(0, "", "")


def test_without_run_dir_a_run_is_named_by_its_time(fedmp: Command, tmp_path: Path) -> None:
    assert fedmp("run", *TINY, "quiet=true").code == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run_dir.name)


def test_fields_that_no_file_names_can_be_set(fedmp: Command, tmp_path: Path) -> None:
    answer = fedmp(
        *("run", *TINY, "run_dir=run", "quiet=true", "strategy.local_epochs=2", "optimizer.nesterov=true"),
        *("server_optimizer=adam", "federated_evaluation=true", "seed=3"),
    )
    assert answer.code == 0, answer.err
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["num_examples"] == 120
    assert row["federated_loss"] > 0


def test_multirun_makes_one_run_directory_a_job(fedmp: Command, tmp_path: Path) -> None:
    answer = fedmp("run", *TINY, "--multirun", "optimizer.lr=0.1,0.01", "quiet=true", "hydra.sweep.dir=sweep")
    assert answer.code == 0, answer.err
    rates = [
        json.loads((tmp_path / "sweep" / str(job) / "config.json").read_text())["optimizer"]["lr"]
        for job in (0, 1)
    ]
    assert rates == [0.1, 0.01]
    assert all((tmp_path / "sweep" / str(job) / "summary.json").exists() for job in (0, 1))


def test_a_sweep_ends_with_a_comparison_and_the_command_compares_again(
    fedmp: Command, tmp_path: Path
) -> None:
    answer = fedmp(
        "simulate", *TINY, "--multirun", "optimizer.lr=0.1,0.01", "quiet=true", "hydra.sweep.dir=sweep"
    )
    assert answer.code == 0, answer.err
    assert "optimizer.lr=0.1" in answer.out
    assert (tmp_path / "sweep" / "comparison.png").stat().st_size > 0
    again = fedmp("compare", "sweep/0", "sweep/1", "--out", "side")
    assert again.code == 0, again.err
    rows = json.loads((tmp_path / "side" / "comparison.json").read_text())
    assert rows == json.loads((tmp_path / "sweep" / "comparison.json").read_text())
    assert_one_line(fedmp("compare"), "needs run directories")
    assert_one_line(fedmp("compare", "side"), "'side' holds no run")


def test_a_users_own_topology_file_and_partitioner_work_from_outside(fedmp: Command, tmp_path: Path) -> None:
    """The modules lie in the current folder, the configs below it; fedmp knows of neither."""
    (tmp_path / "mine.py").write_text(
        "from tests.support.plugins import FirstLayerAlone\n\nclass Mine(FirstLayerAlone):\n    pass\n"
    )
    groups = tmp_path / "conf"
    (groups / "topology").mkdir(parents=True)
    (groups / "topology" / "garage.yaml").write_text(
        "name: garage\nclients:\n  - {name: ann, devices: 2}\n  - {name: bob, devices: 3}\n"
    )
    answer = fedmp(
        *("run", "--config-dir", "conf", "experiment=none", "model=mlp", "engine=simulate", "rounds=1"),
        *("data._target_=tests.support.jobs.images", "data.num_train=40", "quiet=true", "run_dir=run"),
        *("topology=garage", "partitioner._target_=mine.Mine"),
    )
    assert answer.code == 0, answer.err
    plans = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plans.keys() == {"ann", "bob"}
    assert {plan["partitioner"] for plan in plans.values()} == {"first-layer-alone"}
    assert plans["bob"]["stages"][0]["stop"] == 1


def test_plan_prints_a_table_and_writes_a_picture(fedmp: Command, tmp_path: Path) -> None:
    answer = fedmp("plan", *TINY, "run_dir=planned")
    assert (answer.code, answer.err) == (0, "")
    assert "c0" in answer.out
    assert (tmp_path / "planned" / "pictures" / "plan.svg").exists()
    assert "\x1b" not in answer.out


def test_plan_json_is_json_and_nothing_else(fedmp: Command, tmp_path: Path) -> None:
    answer = fedmp("plan", *TINY, "--json")
    assert answer.code == 0
    plans = {name: Plan.model_validate(plan) for name, plan in json.loads(answer.out).items()}
    assert {name: plan.num_stages for name, plan in plans.items()} == {"c0": 2, "c1": 2}
    assert list(tmp_path.iterdir()) == []


def test_a_run_takes_pipeline_choices_from_the_command_line(fedmp: Command, tmp_path: Path) -> None:
    answer = fedmp(
        "run",
        *TINY,
        "run_dir=run",
        "schedule=v_shape",
        "model.hidden=[16,12,10]",
        "pipeline.checkpoint=[0]",
        "pipeline.autocast=bf16",
        "max_gradient_norm=1",
        "accumulate_batches=2",
    )
    assert (answer.code, answer.err) == (0, "")
    plans = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert {plan["schedule"] for plan in plans.values()} == {"v-shape"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["pipeline"]["checkpoint"] == [0]
    assert (config["max_gradient_norm"], config["accumulate_batches"]) == (1.0, 2)


def test_cut_rules_measured_costs_and_leaves_come_from_the_command_line(fedmp: Command) -> None:
    answer = fedmp(
        *("plan", *TINY, "--json", "costs=measured", "partitioner=exact"),
        *("cuts.force=[hidden.1]", "cuts.together=[[hidden.1,head]]", "cuts.devices={hidden.0: d1}"),
    )
    assert answer.code == 0, answer.err
    plan = Plan.model_validate(json.loads(answer.out)["c0"])
    assert [stage.device for stage in plan.stages] == ["d1", "d0"]
    assert plan.layer_names == ("hidden.0", "hidden.1")
    undecided = ("model={_target_: tests.support.plugins.Undecided}", "leaves=[inner]")
    answer = fedmp("plan", *TINY, "--json", *undecided, "topology.clients.devices.count=1")
    assert answer.code == 0, answer.err
    assert Plan.model_validate(json.loads(answer.out)["c0"]).layer_names == ("inner",)


# what does not

WRONG = {
    "unknown pipeline key": (["pipeline.checkpont=true"], r"unknown key pipeline.checkpont"),
    "wrong compression": (["pipeline.compress_gradients=int4"], r"pipeline.compress_gradients is 'int4'"),
    "unknown key": (["rouns=3"], r"unknown key rouns; did you mean rounds\?"),
    "unknown group": (["colour=red"], "unknown key colour; there are model, "),
    "unknown choice": (["model=cnnn"], "group model has no choice 'cnnn'; there are cnn, "),
    "unknown field of a component": (
        ["strategy.fration=0.5"],
        r"unknown key strategy\.fration; did you mean strategy\.fraction\?",
    ),
    "unknown cut rule": (["cuts.forbd=[conv1]"], r"unknown key cuts\.forbd; did you mean cuts\.forbid\?"),
    "cut rule without a module": (["cuts.forbid=[decoder]"], "no module of .* matches 'decoder'"),
    "pin to a device that a client lacks": (
        ["cuts.devices={hidden.*: d7}"],
        "client c0: layer .* is to run on device 'd7', but there are only d0, d1",
    ),
    "leaf without a module": (["leaves=[decoder]"], "no module of .* matches the leaf 'decoder'"),
    "unknown costs": (["costs=guessed"], "costs is 'guessed': .*'flops' or 'measured'"),
    "unknown field of an optimizer": (["optimizer.lrr=1"], r"optimizer .*SGD.*lrr"),
    "unknown field of a topology": (["topology.clients.colour=red"], r"unknown key topology\..*colour"),
    "value of another kind": (["rounds=many"], "rounds is 'many': .*integer"),
    "value out of range": (["rounds=0"], "rounds is 0: .*greater than 0"),
    "value out of a component's range": (
        ["strategy.fraction=2"],
        r"strategy\.fraction is 2: .*less than or equal",
    ),
    "value that torch refuses": (["optimizer.lr=-1"], r"optimizer .*Invalid learning rate: -1"),
    "unknown option": (["--bogus"], "there is no option '--bogus'"),
    "no override": (["rounds"], "rounds"),
    "broken override": (["rounds=[1"], r"\[1"),
    "unknown target": (
        ["partitioner._target_=no.such.Partitioner"],
        r"partitioner \(no\.such\.Partitioner\)",
    ),
    "target that is no class": (["partitioner._target_=torch.pi"], r"partitioner .*torch\.pi"),
    "stage that fits no device": (
        ["topology.clients.devices.memory_bytes=1000"],
        r"needs .* but device 'd0' has 1000 B|needs .* but device 'd0' has",
    ),
    "more stages than layers": (["topology.clients.devices.count=9"], "9 .*but the model has only"),
    "client without data": (
        ["data.num_train=1"],
        "client 1 would have no samples: .* use fewer clients or more data",
    ),
    "untraceable model": (
        ["model._target_=tests.support.plugins.Undecided"],
        "inner.*Branching|Branching.*inner",
    ),
    "unwritable run directory": (
        ["run_dir=/proc/fedmp"],
        "run_dir '/proc/fedmp' cannot be written: .*run_dir=PATH",
    ),
    "resume from nothing": (["resume=absent"], "nothing to resume: 'absent' is not a run directory"),
    "data that are not there": (["data={_target_: fedmp.data.MNIST}"], "MNIST.*FEDMP_DATA_DIR"),
    "engine port out of range": (["engine=local", "engine.port=70000"], r"engine\.port is 70000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_gives_one_clear_line_and_leaves_nothing(
    fedmp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    arguments, pattern = WRONG[case]
    if case == "data that are not there":
        (tmp_path.parent / "no-data").mkdir(exist_ok=True)
        monkeypatch.setenv("FEDMP_DATA_DIR", str(tmp_path.parent / "no-data"))
        arguments = ["~data.num_train", "data._target_=fedmp.data.MNIST"]
    run_dir = [] if any(a.startswith(("run_dir", "resume")) for a in arguments) else ["run_dir=new/run"]
    assert_one_line(fedmp("run", *TINY, *run_dir, *arguments), pattern)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_named_and_nothing_is_written(fedmp: Command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = fedmp("run", *TINY, "engine=local", f"engine.port={port}", "run_dir=new/run")
    assert_one_line(answer, rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use.*engine\.port")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["simulate", "local"])
def test_a_loss_that_is_not_finite_names_client_stage_and_round(
    fedmp: Command, tmp_path: Path, engine: str
) -> None:
    answer = fedmp("run", *TINY, f"engine={engine}", "optimizer.lr=1e30", "run_dir=run")
    # the loss is NaN on the last stage and, through its gradients, the weights on the one before
    what = r"(the loss is (nan|inf)|\S+ is not finite any more)"
    assert_one_line(answer, what + r" at client c\d, stage \d, (after )?round 1.*optimizer\.lr")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_run_that_diverged_can_be_run_again_in_the_same_directory(fedmp: Command, tmp_path: Path) -> None:
    assert fedmp("run", *TINY, "optimizer.lr=1e30", "run_dir=run").code == 2
    assert fedmp("run", *TINY, "optimizer.lr=0.1", "run_dir=run").code == 0


def test_an_empty_folder_to_resume_from_is_left_alone(fedmp: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(fedmp("run", *TINY, "resume=empty"), "nothing to resume: .*empty.* holds no checkpoint")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_run_directory_that_is_a_file_is_named(fedmp: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_one_line(fedmp("run", *TINY, "run_dir=file"), "run_dir .*file' cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_command_is_named_with_those_that_there_are(fedmp: Command) -> None:
    assert_one_line(fedmp("trian", *TINY), "there is no command 'trian'; there are run, simulate, plan")


def test_a_config_folder_that_is_not_there_is_named(fedmp: Command) -> None:
    assert_one_line(fedmp("run", "--config-dir", "absent"), "absent")


def test_a_config_file_that_is_no_yaml_is_named(fedmp: Command, tmp_path: Path) -> None:
    (tmp_path / "conf" / "topology").mkdir(parents=True)
    (tmp_path / "conf" / "topology" / "torn.yaml").write_text("clients: [")
    assert_one_line(fedmp("run", "--config-dir", "conf", "topology=torn"), "torn.yaml")


def test_one_wrong_job_of_a_multirun_ends_it_with_one_line(fedmp: Command) -> None:
    answer = fedmp("run", *TINY, "--multirun", "rounds=1,0", "quiet=true", "hydra.sweep.dir=sweep")
    assert_one_line(answer, "rounds is 0")


def test_a_mistake_on_the_real_command_line_gives_exit_code_two(tmp_path: Path) -> None:
    process = start("run", *TINY, "rouns=3", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert_one_line(Answer(process.returncode, out, err), "unknown key rouns")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_stops_the_run_with_one_line_and_every_process(tmp_path: Path) -> None:
    """`tests/conftest.py` looks for processes that are left."""
    process = start("run", *TINY, "engine=local", "rounds=100000", "run_dir=run", cwd=tmp_path)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(re.search(r"round +1/100000", line) for line in lines), "the plain view shows each round"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert err == "fedmp: error: interrupted; committed rounds are kept, go on with resume=DIR\n"
