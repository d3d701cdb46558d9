"""The journal: whole clients only, checked again when a coordinator comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedmp.aggregate
from fedmp.aggregate import WeightedMean
from fedmp.coordinator import Journal
from fedmp.errors import RefusedError
from fedmp.records import DeviceReport
from tests.support.service import STAGES, body, specs, state, update

WHOLE = {"ann": STAGES, "bob": STAGES}


def opened(folder: Path, round: int = 1) -> Journal:
    journal = Journal(folder, specs())
    journal.open(round)
    return journal


def put(journal: Journal, client: str, stage: int, payload: bytes | None = None) -> None:
    part = journal.temporary(client, stage)
    part.write_bytes(payload or body(update(stage)))
    journal.accept(part, client, stage, STAGES[stage])


def test_a_client_is_whole_once_all_its_stages_are_there(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    put(journal, "ann", 0)
    assert journal.update_of("ann", 2) is None
    put(journal, "ann", 1)
    whole = journal.update_of("ann", 2)
    assert whole is not None
    assert set(whole) == {"a.weight", "a.mean", "b.weight", "b.count"}


def test_updates_survive_a_restart_with_the_generation_that_made_them(tmp_path: Path) -> None:
    before = opened(tmp_path)
    for stage in (0, 1):
        put(before, "ann", stage)
    put(before, "bob", 1, body(update(1), DeviceReport(num_examples=1, generation="g")))
    assert opened(tmp_path).found(WHOLE) == {("ann", 0): "", ("ann", 1): "", ("bob", 1): "g"}


def test_an_update_of_another_generation_is_refused(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    part = journal.temporary("ann", 0)
    part.write_bytes(body(update(0), DeviceReport(num_examples=1, generation="old")))
    with pytest.raises(RefusedError, match="made by generation 'old'.* generation 'new' is up") as refused:
        journal.accept(part, "ann", 0, STAGES[0], generation="new")
    assert (refused.value.status, refused.value.reason) == (409, "wrong-generation")
    assert not journal.has("ann", 0)


def test_a_client_whose_plan_changed_is_dropped_after_a_restart(tmp_path: Path) -> None:
    """Its files hold the stages of another plan: fewer stages, more stages, or other tensors in each."""
    for plan in ([(*STAGES[0], *STAGES[1])], [("a.weight",), ("a.mean",), STAGES[1]], [STAGES[1], STAGES[0]]):
        before = opened(tmp_path)
        for stage in (0, 1):
            put(before, "ann", stage)
        journal = opened(tmp_path)
        assert journal.found({"ann": plan}) == {}
        assert not any(journal.has("ann", stage) for stage in range(3))


def test_a_file_that_was_torn_is_dropped_with_its_client_after_a_restart(tmp_path: Path) -> None:
    before = opened(tmp_path)
    for stage in (0, 1):
        put(before, "ann", stage)
    path = tmp_path / "round-00001" / "ann.1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert opened(tmp_path).found(WHOLE) == {}


def test_unfinished_uploads_are_swept_up_after_a_restart(tmp_path: Path) -> None:
    opened(tmp_path).temporary("ann", 0).write_bytes(b"half")
    opened(tmp_path)
    assert list((tmp_path / "round-00001").iterdir()) == []


def test_files_of_other_rounds_are_swept_up(tmp_path: Path) -> None:
    put(opened(tmp_path, 1), "ann", 0)
    opened(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["round-00002"]


def test_a_closed_round_leaves_no_file(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    put(journal, "ann", 0)
    journal.close()
    assert list(tmp_path.iterdir()) == []
    assert journal.round == 0


def test_a_refused_upload_does_not_take_the_place_of_a_good_one(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    put(journal, "ann", 0)
    with pytest.raises(RefusedError):
        put(journal, "ann", 0, b"garbage")
    assert journal.has("ann", 0)


def test_a_client_counts_with_the_fewest_samples_of_its_stages(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for stage, num_examples in enumerate((12, 7)):
        put(journal, "ann", stage, body(update(stage), DeviceReport(num_examples=num_examples)))
    whole = journal.update_of("ann", 2)
    assert whole is not None
    assert whole.num_examples == 7


def test_a_global_stage_is_written_once_and_shared_by_equal_stages(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    first = journal.global_stage(STAGES[0], state(), "key")
    written = first.stat().st_mtime_ns
    assert journal.global_stage(STAGES[0], state(), "key") == first
    assert first.stat().st_mtime_ns == written


@pytest.mark.parametrize("rule", sorted(set(fedmp.aggregate.__all__) - {"Aggregator", "gives_views"}))
def test_stage_wise_aggregation_equals_whole_model_aggregation_whatever_the_plans(
    tmp_path: Path, rule: str
) -> None:
    """One client pushes its model whole, others in two or three stages: the result is the same, bit for bit."""
    names = tuple(specs())
    plans = {"ann": (names,), "bob": STAGES, "cid": (names[:1], names[1:3], names[3:])}
    plans |= {f"{client}2": stages for client, stages in plans.items()} | {"dan": STAGES}
    generator = torch.Generator().manual_seed(0)
    updates = {
        client: {
            name: torch.randint(0, 9, spec.shape, generator=generator)
            if name == "b.count"
            else torch.randn(spec.shape, generator=generator)
            for name, spec in specs().items()
        }
        for client in plans
    }
    samples = {client: 3 + 11 * index for index, client in enumerate(plans)}
    journal = opened(tmp_path)
    for client, stages in plans.items():
        for stage, wanted in enumerate(stages):
            part = journal.temporary(client, stage)
            tensors = {name: updates[client][name] for name in wanted}
            part.write_bytes(body(tensors, DeviceReport(num_examples=samples[client])))
            journal.accept(part, client, stage, wanted)
    journalled = [journal.update_of(client, len(plans[client])) for client in plans]
    weights = [float(update.num_examples) for update in journalled if update]
    aggregator = getattr(fedmp.aggregate, rule)()
    combined = aggregator.combine([update for update in journalled if update], weights)
    whole = aggregator.combine(list(updates.values()), [float(samples[client]) for client in plans])
    assert combined.keys() == whole.keys()
    assert all(torch.equal(combined[name], whole[name]) for name in whole)


def test_the_mean_does_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    """float32 sums depend on their order, so equality bit for bit shows that the order is the clients'."""
    clients = ("ann", "bob", "cid", "dan")
    generator = torch.Generator().manual_seed(0)
    updates = {
        client: {
            "a.weight": torch.randn(3, 2, generator=generator) * 10.0**index,
            "a.mean": torch.ones(3) / 3,
        }
        for index, client in enumerate(clients)
    }
    means = []
    for number, order in enumerate(([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1])):
        journal = opened(tmp_path / str(number))
        for index in order:
            put(
                journal,
                clients[index],
                0,
                body(updates[clients[index]], DeviceReport(num_examples=index + 1)),
            )
        journalled = [journal.update_of(client, 1) for client in clients]
        means.append(
            WeightedMean().combine([update for update in journalled if update], [1.0, 2.0, 3.0, 4.0])
        )
    for mean in means[1:]:
        assert all(torch.equal(mean[name], means[0][name]) for name in means[0])


def test_tensors_are_views_of_the_mapped_files(tmp_path: Path) -> None:
    """So aggregators may hold one of every client without memory for it."""
    journal = opened(tmp_path)
    for stage in (0, 1):
        put(journal, "ann", stage)
    whole = journal.update_of("ann", 2)
    assert whole is not None
    assert whole.gives_views
    once, again = whole["a.weight"], whole["a.weight"]
    assert once.data_ptr() == again.data_ptr()
