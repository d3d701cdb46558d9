from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from fedmp.errors import ConfigError
from fedmp.records import Plan, Summary
from fedmp.report import RunDirectory
from fedmp.report.files import write_atomically
from tests.report.samples import make_clients, make_plan, make_records, make_summary, make_timeline


def test_a_run_directory_holds_what_was_written(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a" / "b")
    run.write_config({"rounds": 3, "name": "Zürich"})
    run.write_plans({"lab": make_plan()})
    run.write_summary(make_summary())
    assert json.loads((run.path / "config.json").read_text("utf-8")) == {"rounds": 3, "name": "Zürich"}
    assert Plan.model_validate(json.loads((run.path / "plan.json").read_text())["lab"]) == make_plan()
    assert Summary.model_validate_json((run.path / "summary.json").read_text()) == make_summary()
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "plan.json", "summary.json"]


def test_metrics_come_back_as_they_went(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    assert run.read_metrics() == ()
    assert not run.has_metrics
    for record in make_records(3):
        run.append_metrics(record)
    assert run.read_metrics() == make_records(3)
    assert run.has_metrics


def test_a_loss_that_is_not_finite_survives_and_stays_valid_json(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.append_metrics(make_records(1)[0].model_copy(update={"train_loss": math.nan, "test_loss": math.inf}))
    json.loads(run.metrics_path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert math.isnan(run.read_metrics()[0].train_loss)
    assert run.read_metrics()[0].test_loss == math.inf


def test_every_torn_last_line_is_skipped_and_replaced(tmp_path: Path) -> None:
    first, second = make_records(2)
    run = RunDirectory.create(tmp_path)
    run.append_metrics(first)
    whole = run.metrics_path.read_bytes()
    for length in range(1, len(whole)):
        run.metrics_path.write_bytes(whole + whole[:length])
        assert run.read_metrics() == (first,)
    run.append_metrics(second)
    assert run.read_metrics() == (first, second)


def test_a_malformed_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.append_metrics(make_records(1)[0])
    with run.metrics_path.open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*metrics\.jsonl"):
        run.read_metrics()


@pytest.mark.parametrize("after_round", [0, 1, 3, 9])
def test_truncated_metrics_can_be_appended_to(tmp_path: Path, after_round: int) -> None:
    run = RunDirectory.create(tmp_path)
    for record in make_records(3):
        run.append_metrics(record)
    run.truncate_metrics(after_round)
    assert run.read_metrics() == make_records(3)[:after_round]
    run.append_metrics(make_records(4)[3])
    assert [record.round for record in run.read_metrics()] == [*range(1, min(after_round, 3) + 1), 4]


def test_a_path_below_a_file_is_refused_with_path_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"run_dir '.*file.*' cannot be written: .*run_dir=PATH"):
            RunDirectory.create(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        RunDirectory.create(tmp_path)


def test_creating_leaves_an_earlier_run_alone(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path).append_metrics(make_records(1)[0])
    assert RunDirectory.create(tmp_path).read_metrics() == make_records(1)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path)
    run.write_config({"rounds": 1})

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        run.write_config({"rounds": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"rounds": 1}


def test_an_atomic_write_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        write_atomically(tmp_path / "x", b"1")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


def test_pictures_are_drawn_for_what_there_is(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    assert run.write_pictures(plans={}, clients=(), records=()) == ()
    paths = run.write_pictures(
        plans={"lab": make_plan()},
        clients=make_clients(2),
        records=make_records(2),
        timeline=make_timeline(),
        suffixes=(".svg", ".png"),
    )
    assert {path.name for path in paths} == {path.name for path in run.pictures_path.iterdir()}
    assert {path.stem for path in paths} == {"accuracy", "data", "plan", "timeline"}
    assert len(paths) == 8
