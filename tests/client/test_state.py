"""What a client keeps: by round, whole or not at all, and readable whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmp.client import StateStore
from fedmp.client import state as module
from fedmp.client.state import tensor_of
from fedmp.records import round_of_key, state_key


def tensors(value: float, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2,), value) for name in names}


@pytest.fixture(params=["files", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    return StateStore(tmp_path / "state" if request.param == "files" else None)


def test_a_round_redone_starts_from_the_same_state_again(store: StateStore) -> None:
    store.save("lab", "00003", "d0", tensors(3, "own/w"), base="")
    store.save("lab", "00007-a", "d0", tensors(7, "own/w"), base="00003")
    store.save("lab", "00007-b", "d0", tensors(8, "own/w"), base="00003")
    assert store.load("lab", "00003")["own/w"].tolist() == [3, 3]
    assert store.load("lab", "00007-b")["own/w"].tolist() == [8, 8]
    assert store.load("lab", "00007-a") == {}, "only what a round started from and ended with is kept"


def test_parts_of_several_devices_are_read_as_one(store: StateStore) -> None:
    for part, names in {"d0": ("own/a", "kept/control/a"), "d1": ("own/b",)}.items():
        store.save("lab", "00001", part, tensors(1, *names), base="")
    assert set(store.load("lab", "00001")) == {"own/a", "kept/control/a", "own/b"}
    assert set(store.load("lab", "00001", wanted=lambda n: tensor_of(n) == "a")) == {
        "own/a",
        "kept/control/a",
    }


def test_clients_do_not_see_each_others_state(store: StateStore) -> None:
    store.save("lab", "00001", "d0", tensors(1, "own/a"), base="")
    store.save("site", "00001", "d0", tensors(2, "own/a"), base="")
    assert store.load("lab", "00001")["own/a"].tolist() == [1, 1]
    assert store.load("other", "00001") == store.load("lab", "") == {}


def test_what_was_saved_does_not_change_with_the_tensors(store: StateStore) -> None:
    state = tensors(1, "own/a")
    store.save("lab", "00001", "d0", state, base="")
    state["own/a"].add_(1)
    assert store.load("lab", "00001")["own/a"].tolist() == [1, 1]


def test_no_state_writes_no_folder(tmp_path: Path) -> None:
    StateStore(tmp_path / "state").save("lab", "00001", "d0", {}, base="")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("call", ["save_file", "_flush"])
def test_killed_while_it_saves_it_leaves_the_state_before(call: str, tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save("lab", "00001", "d0", tensors(1, "own/a"), base="")
    with pytest.MonkeyPatch.context() as patch:

        def kill(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(module, call, kill)
        with pytest.raises(KeyboardInterrupt):
            store.save("lab", "00002", "d0", tensors(2, "own/a"), base="00001")
    again = StateStore(tmp_path)
    assert again.load("lab", "00001")["own/a"].tolist() == [1, 1]
    assert again.load("lab", "00002") == {}


def test_a_damaged_file_is_as_good_as_none(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save("lab", "00001", "d0", tensors(1, "own/a"), base="")
    (tmp_path / "lab" / "00001" / "d0.safetensors").write_bytes(b"torn")
    assert store.load("lab", "00001") == {}


def test_a_key_tells_its_round() -> None:
    assert round_of_key(state_key(12, "f00d-1")) == round_of_key(state_key(12)) == 12
    assert round_of_key("") == 0
