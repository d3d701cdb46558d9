"""The journal while clients are late: their rounds' files stay, and a round closes twice in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedmp.coordinator import Journal
from fedmp.errors import RefusedError
from tests.support.service import STAGES, body, specs, state, update


def put(journal: Journal, client: str, stage: int, value: float = 1.0) -> None:
    part = journal.temporary(client, stage)
    part.write_bytes(body(update(stage, value)))
    journal.accept(part, client, stage, STAGES[stage])


def closed_with_bob_late(folder: Path) -> Journal:
    """Round 1 took ann's update, round 2 is open, and bob goes on with round 1."""
    journal = Journal(folder, specs())
    journal.open(1)
    put(journal, "ann", 0)
    put(journal, "ann", 1)
    put(journal, "bob", 0)
    journal.seal(state())
    journal.close({"bob": 1})
    journal.open(2, {"bob": 1})
    return journal


def test_a_late_update_is_filed_with_the_round_that_it_started_from(tmp_path: Path) -> None:
    journal = closed_with_bob_late(tmp_path)
    put(journal, "bob", 1)
    late = journal.update_of("bob", 2)
    assert late is not None
    assert late.round == 1
    assert (tmp_path / "round-00001" / "bob.1.safetensors").exists()
    assert journal.update_of("ann", 2) is None, "round 2 has nothing of ann"


def test_a_committed_round_keeps_only_what_a_late_client_needs(tmp_path: Path) -> None:
    closed_with_bob_late(tmp_path)
    names = {path.name for path in (tmp_path / "round-00001").iterdir()}
    assert names == {"bob.0.safetensors", "model.safetensors"}


def test_an_update_is_taken_between_two_rounds(tmp_path: Path) -> None:
    journal = Journal(tmp_path, specs())
    journal.open(1)
    journal.seal(state())
    journal.close({"bob": 1})
    put(journal, "bob", 0)
    journal.open(2, {"bob": 1})
    assert journal.has("bob", 0)


def test_acknowledged_late_updates_survive_a_restart(tmp_path: Path) -> None:
    put(closed_with_bob_late(tmp_path), "bob", 1)
    again = Journal(tmp_path, specs())
    again.open(2, {"bob": 1})
    assert set(again.found({"bob": STAGES})) == {("bob", 0), ("bob", 1)}


def test_a_late_client_pulls_the_stage_that_it_started_from(tmp_path: Path) -> None:
    journal = closed_with_bob_late(tmp_path)
    moved = {name: tensor + 1 for name, tensor in state().items()}
    for names, key in ((STAGES[0], "stage0"), (tuple(specs()), "another plan's")):
        old = load_file(journal.global_stage(names, moved, key, client="bob"))
        new = load_file(journal.global_stage(names, moved, key, client="ann"))
        assert old.keys() == new.keys() == set(names)
        for name in names:
            assert torch.equal(old[name], state()[name])
            assert torch.equal(new[name], moved[name])


def test_no_stage_is_written_of_a_model_that_is_about_to_move(tmp_path: Path) -> None:
    journal = Journal(tmp_path, specs())
    journal.open(1)
    journal.seal(None)
    with pytest.raises(RefusedError, match="round 1 is over"):
        journal.global_stage(STAGES[0], state(), "stage0", client="ann")


def test_the_files_of_a_round_go_with_the_last_client_that_needs_them(tmp_path: Path) -> None:
    journal = closed_with_bob_late(tmp_path)
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_how_a_round_was_closed_is_known_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path, specs())
    journal.open(1)
    assert journal.decision() is None
    journal.decide({"counted": ["ann"]})
    again = Journal(tmp_path, specs())
    again.open(1)
    assert again.decision() == {"counted": ["ann"]}
    again.close()
    again.open(2)
    assert again.decision() is None


def test_clients_are_found_in_the_order_in_which_they_were_complete(tmp_path: Path) -> None:
    journal = Journal(tmp_path, specs())
    journal.open(1)
    put(journal, "ann", 0)
    put(journal, "bob", 1)
    put(journal, "bob", 0)
    put(journal, "ann", 1)
    plans = dict.fromkeys(("ann", "bob"), STAGES)
    assert list(dict.fromkeys(client for client, _ in journal.found(plans))) == ["bob", "ann"]
