"""Checkpoints are whole or absent, wherever the process dies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fedmp.coordinator.checkpoint as module
from fedmp.coordinator import Checkpoint, CheckpointStore, Standing
from fedmp.errors import ResumeError
from fedmp.records import RoundRecord


def checkpoint(round: int) -> Checkpoint:
    return Checkpoint(
        round=round,
        fingerprint="f00d",
        state={"w": torch.full((2, 3), float(round)).T, "count": torch.tensor(round)},
        optimizer_tensors={
            "w/exp_avg": torch.full((3, 2), 0.1 * round),
            "w/step": torch.tensor(float(round)),
        },
        optimizer_values={"w/amsgrad": False},
        optimizer="Adam",
        record=RoundRecord(round=max(round, 1), clients=("a",), num_examples=3, train_loss=float("nan")),
        roster={"a": Standing("00001", 0.1 * round), "b": Standing("00001-x"), "c": Standing("", 2)},
    )


def assert_equal(read: Checkpoint, written: Checkpoint) -> None:
    assert (read.round, read.fingerprint, read.optimizer) == (
        written.round,
        written.fingerprint,
        written.optimizer,
    )
    for ours, theirs in ((read.state, written.state), (read.optimizer_tensors, written.optimizer_tensors)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read.optimizer_values == written.optimizer_values
    assert read.roster == written.roster
    assert all(isinstance(standing, Standing) for standing in read.roster.values())
    assert repr(read.record) == repr(written.record)  # repr, as NaN does not equal itself


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new" / "folder")
    store.save(checkpoint(1))
    assert_equal(store.latest(), checkpoint(1))


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for round in range(9, 13):
        store.save(checkpoint(round))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00011", "round-00012"]
    assert store.latest().round == 12


def _kill_at(patch: pytest.MonkeyPatch, target: object, name: str, call: int) -> None:
    """Let the `call`-th call of a function raise, as if the process ended there."""
    real: Callable[..., object] = getattr(target, name)
    calls = []

    def dying(*args: object, **kwargs: object) -> object:
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    patch.setattr(target, name, dying)


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        (module, "save_file", 1),
        (module, "save_file", 2),
        (Path, "write_text", 1),
        (module, "flush", 1),
        (module, "flush", 4),
        (os, "replace", 1),
        (module, "flush", 5),
    ],
    ids=["model", "optimizer", "manifest", "first flush", "last flush", "rename", "flush of the folder"],
)
def test_killed_while_it_saves_it_leaves_a_whole_checkpoint(
    tmp_path: Path, target: object, name: str, call: int
) -> None:
    CheckpointStore(tmp_path).save(checkpoint(1))
    with pytest.MonkeyPatch.context() as patch:
        _kill_at(patch, target, name, call)
        with pytest.raises(KeyboardInterrupt):
            CheckpointStore(tmp_path).save(checkpoint(2))
    found = CheckpointStore(tmp_path).latest()
    assert_equal(found, checkpoint(2 if (name, call) == ("flush", 5) else 1))
    CheckpointStore(tmp_path).save(checkpoint(2))
    assert_equal(CheckpointStore(tmp_path).latest(), checkpoint(2))


def test_a_first_checkpoint_killed_half_way_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _kill_at(patch, os, "replace", 1)
        with pytest.raises(KeyboardInterrupt):
            CheckpointStore(tmp_path).save(checkpoint(0))
    with pytest.raises(ResumeError, match="holds no checkpoint"):
        CheckpointStore(tmp_path).latest()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "torn", "another kind"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    CheckpointStore(tmp_path).save(checkpoint(3))
    path = tmp_path / "round-00003" / name
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.write_bytes(b"[1, 2]")
    with pytest.raises(ResumeError, match=r"checkpoint .*round-00003 cannot be read"):
        CheckpointStore(tmp_path).latest()


@pytest.mark.parametrize("standing", [{"state": "00001"}, ["00001"], [1, 2.0], ["00001", "low"], None])
def test_a_checkpoint_with_a_standing_that_is_none_is_refused(tmp_path: Path, standing: object) -> None:
    CheckpointStore(tmp_path).save(checkpoint(3))
    path = tmp_path / "round-00003" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "roster": {"a": standing}}))
    with pytest.raises(ResumeError, match="no client's state and loss"):
        CheckpointStore(tmp_path).latest()


@pytest.mark.parametrize("told", [None, 3])
def test_another_versions_checkpoint_is_named_as_such(tmp_path: Path, told: int | None) -> None:
    store = CheckpointStore(tmp_path)
    store.save(checkpoint(3))
    path = tmp_path / "round-00003" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["format"]
    path.write_text(json.dumps(manifest | ({} if told is None else {"format": told})))
    with pytest.raises(ResumeError, match=f"another version of fedmp .format {told or 1}, this one reads 2"):
        store.latest()


def test_no_code_is_read_back(tmp_path: Path) -> None:
    """A checkpoint may come from elsewhere: tensors and JSON only."""
    CheckpointStore(tmp_path).save(checkpoint(1))
    kinds = {path.suffix for path in (tmp_path / "round-00001").iterdir()}
    assert kinds == {".safetensors", ".json"}
    assert safetensors.torch.load_file(tmp_path / "round-00001" / "model.safetensors").keys() == {
        "w",
        "count",
    }


def test_an_absent_folder_is_nothing_to_resume(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    with pytest.raises(ResumeError, match="nothing to resume"):
        CheckpointStore(tmp_path).latest()
