"""A run that is resumed ends bit for bit like one that never stopped."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmp.coordinator import CheckpointStore
from fedmp.engine.simulate import SimulateEngine
from fedmp.errors import ConfigError, ResumeError
from fedmp.models import MLP
from fedmp.records import Event, RoundFinished
from fedmp.report import RunDirectory
from tests.support.jobs import assert_same, images, run, sgd, tiny_job, weights

SERVERS: dict[str, Any] = {
    "averaging": None,
    "server momentum": sgd(0.7, momentum=0.9),
    "server Adam": partial(torch.optim.Adam, lr=0.01),
    "server Adagrad": partial(torch.optim.Adagrad, lr=0.01),
}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The directory of a finished run of two rounds."""
    run(tiny_job(), tmp_path / "finished")
    return tmp_path / "finished"


@pytest.mark.parametrize(
    "server",
    [
        *("averaging", "server Adam"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("server momentum", "server Adagrad")),
    ],
)
def test_a_simulated_run_resumed_equals_an_uninterrupted_one(server: str, tmp_path: Path) -> None:
    _check_resume("simulate", server, tmp_path)


@pytest.mark.parametrize("server", [pytest.param("averaging", marks=pytest.mark.slow), "server Adam"])
def test_a_local_run_resumed_equals_an_uninterrupted_one(server: str, tmp_path: Path) -> None:
    _check_resume("local", server, tmp_path)


def _check_resume(engine: str, server: str, tmp_path: Path) -> None:
    def job(rounds: int) -> Any:
        return tiny_job(rounds=rounds, server_optimizer=SERVERS[server], data=images(60))

    whole = run(job(4), tmp_path / "whole", engine)
    run(job(2), tmp_path / "parts", engine)
    resumed = run(job(4), tmp_path / "parts", engine, resume=True)
    assert_same(weights(resumed), weights(whole))
    assert [r.round for r in resumed.history] == [1, 2, 3, 4]
    assert [r.train_loss for r in resumed.history] == [r.train_loss for r in whole.history]
    assert [r.test_loss for r in resumed.history] == [r.test_loss for r in whole.history]
    assert resumed.summary.rounds == 4


def test_a_run_that_failed_in_its_third_round_goes_on_from_there(tmp_path: Path) -> None:
    class StopHereError(Exception):
        pass

    def interrupt(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.record.round == 2:
            raise StopHereError

    job = tiny_job(rounds=3)
    whole = run(job, tmp_path / "whole")
    with pytest.raises(StopHereError):
        job.run("simulate", run_dir=tmp_path / "parts", observe=interrupt)
    assert_same(weights(run(job, tmp_path / "parts", resume=True)), weights(whole))


def test_a_run_that_ended_between_a_commit_and_its_row_loses_neither_round_nor_row(tmp_path: Path) -> None:
    job = tiny_job(rounds=3)
    whole = run(job, tmp_path / "whole")
    run(tiny_job(rounds=2), tmp_path / "parts")
    RunDirectory.create(tmp_path / "parts").truncate_metrics(1)
    resumed = run(job, tmp_path / "parts", resume=True)
    assert [record.round for record in resumed.history] == [1, 2, 3]
    assert resumed.history[1].train_loss == whole.history[1].train_loss
    assert_same(weights(resumed), weights(whole))


def test_a_run_that_ended_between_a_row_and_its_commit_does_the_round_again(tmp_path: Path) -> None:
    whole = run(tiny_job(rounds=3), tmp_path / "whole")
    run(tiny_job(rounds=2), tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "round-00002")
    resumed = run(tiny_job(rounds=3), tmp_path / "parts", resume=True)
    assert [record.round for record in resumed.history] == [1, 2, 3]
    assert_same(weights(resumed), weights(whole))


def test_resume_refuses_a_run_of_another_model(finished: Path) -> None:
    other = tiny_job(model=partial(MLP, 784, (8,)), rounds=4)
    with pytest.raises(ResumeError, match=r"trained another model .* resume with the config it began with"):
        run(other, finished, resume=True)


def test_resume_refuses_a_folder_without_checkpoints_and_leaves_it_there(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ResumeError, match=r"nothing to resume: .*empty.* holds no checkpoint"):
        run(tiny_job(), folder, resume=True)
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_resume_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"nothing to resume: .*absent' is not a run directory"):
        run(tiny_job(), tmp_path / "absent", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_resume_refuses_a_run_that_has_finished(finished: Path) -> None:
    with pytest.raises(ResumeError, match="has finished 2 rounds; ask for more with rounds=NUMBER"):
        run(tiny_job(rounds=2), finished, resume=True)


def test_resume_refuses_state_of_another_server_optimizer(tmp_path: Path) -> None:
    adam = tiny_job(server_optimizer=SERVERS["server Adam"], rounds=1)
    run(adam, tmp_path / "run")
    for server, name in [(SERVERS["server momentum"], "SGD"), (None, "plain averaging")]:
        with pytest.raises(ResumeError, match=f"server optimizer Adam, which {name} cannot use"):
            run(tiny_job(server_optimizer=server, rounds=2), tmp_path / "run", resume=True)


def test_resume_refuses_a_checkpoint_that_cannot_be_read(finished: Path) -> None:
    (finished / "checkpoints" / "round-00002" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ResumeError, match=r"checkpoint .*round-00002 cannot be read"):
        run(tiny_job(rounds=3), finished, resume=True)


def test_a_refused_resume_changes_nothing(finished: Path) -> None:
    before = _contents(finished)
    with pytest.raises(ResumeError):
        run(tiny_job(model=partial(MLP, 784, (8,)), rounds=4), finished, resume=True)
    assert _contents(finished) == before


def test_a_directory_that_holds_a_run_is_refused_and_not_touched(finished: Path) -> None:
    before = _contents(finished)
    with pytest.raises(ConfigError, match=r"holds a run already; go on with it by resume="):
        run(tiny_job(), finished)
    assert _contents(finished) == before


def test_a_new_run_takes_nothing_from_one_that_failed_in_its_first_round_there(tmp_path: Path) -> None:
    """The journal of the failed run holds updates and global stages that look like the new run's."""
    expected = run(tiny_job(rounds=1, seed=1), tmp_path / "clean", "local")

    class StopHereError(Exception):
        pass

    def interrupt(event: Event) -> None:
        if isinstance(event, RoundFinished):
            raise StopHereError

    folder = tmp_path / "twice"
    with pytest.raises(StopHereError):
        tiny_job(rounds=1, seed=0).run("local", run_dir=folder, observe=interrupt)
    # as if it had been killed before the commit, with every update in the journal
    (folder / "metrics.jsonl").unlink()
    _journal_of_all_zeros(folder)
    assert_same(weights(run(tiny_job(rounds=1, seed=1), folder, "local")), weights(expected))


def _journal_of_all_zeros(folder: Path) -> None:
    from safetensors.torch import save_file

    from fedmp.engine.members import members_of
    from fedmp.engine.prepare import prepare
    from fedmp.records import DeviceReport

    prepared = prepare(tiny_job(rounds=1, seed=0))
    journal = folder / "journal" / "round-00001"
    journal.mkdir(parents=True, exist_ok=True)
    report = {"report": DeviceReport(num_examples=45).model_dump_json()}
    for member in members_of(prepared):
        zeros = {n: torch.zeros(prepared.graph.state[n].shape) for n in member.pushed}
        save_file(zeros, journal / f"{member.client}.{member.rank}.safetensors", metadata=report)


def test_checkpoints_keep_the_two_newest_rounds(tmp_path: Path) -> None:
    run(tiny_job(rounds=4), tmp_path / "run", SimulateEngine(checkpoint_s=0))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["round-00003", "round-00004"]
    assert CheckpointStore(tmp_path / "run" / "checkpoints").latest().round == 4


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
