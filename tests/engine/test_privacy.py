"""No raw sample reaches the coordinator: every byte that its service receives is searched for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save

import fedmp.engine.local
from fedmp import Job
from fedmp.coordinator import CoordinatorService
from fedmp.data import Dataset
from fedmp.data.order import one_pass
from fedmp.seeds import derive_seed
from fedmp.strategy import FedAvg
from tests.support.jobs import TINY_CNN, images, run, tiny_job, topology
from tests.support.recorder import RecordingProxy, find_labels, find_pieces

JOB = tiny_job(
    model=TINY_CNN,
    topology=topology(2, 1),
    data=images(32),
    strategy=FedAvg(local_epochs=2),
    rounds=2,
    batch_size=5,
    federated_evaluation=True,
)


def forms(data: Dataset) -> Iterator[npt.NDArray[np.generic]]:
    """Every image by rows and by columns: as it is stored, scaled, and as the model takes it."""
    assert data.inputs is not None
    raw = data.inputs.numpy()
    scaled = raw.astype(np.float32) / 255
    ready = data.input_batch(range(len(data))).numpy()[:, 0]
    for kind in (raw, scaled, ready):
        for image in kind:
            yield image.reshape(-1)
            yield image.T.reshape(-1)


def client_data(job: Job) -> dict[str, Dataset]:
    train = job.source().load().train
    names = [client.name for client in job.topology.clients]
    parts = job.split.assign(train, len(names), derive_seed(job.seed, "split") % 2**32)
    return {name: train.select(rows) for name, rows in zip(names, parts, strict=True)}


def label_orders(job: Job) -> list[list[int]]:
    """Each client's labels as it stores them, and in the order of each epoch's batches."""
    orders = []
    for name, data in client_data(job).items():
        assert data.targets is not None
        orders.append(data.targets.tolist())
        for round in (1, 2):
            for epoch in (0, 1):
                order = one_pass(len(data), seed=job.seed, client=name, round=round, epoch=epoch)
                orders.append(data.targets[order].tolist())
    return orders


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Everything that the devices of a real run sent to the coordinator."""
    seen: list[bytes] = []

    class Recorded(CoordinatorService):
        def __enter__(self) -> Recorded:
            super().__enter__()
            address = urlsplit(self.url)
            assert address.hostname is not None
            assert address.port is not None
            self.proxy = RecordingProxy(address.hostname, address.port).__enter__()
            self.url = f"http://127.0.0.1:{self.proxy.port}"
            return self

        def __exit__(self, *details: object) -> None:
            seen.extend(self.proxy.connections())
            self.proxy.__exit__(None, None, None)
            super().__exit__(*details)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedmp.engine.local, "CoordinatorService", Recorded)
        run(JOB, tmp_path_factory.mktemp("privacy") / "run", "local")
    return b"\n".join(seen)


def test_the_recording_holds_whole_requests_with_every_update(received: bytes) -> None:
    """The searches below would find nothing in an empty recording."""
    assert received.count(b"PUT /v1/rounds/1/update") == 3
    assert received.count(b"PUT /v1/rounds/2/update") == 3
    assert received.count(b"GET /v1/rounds/2/stage") == 3
    assert b"stem.0.weight" in received
    assert b"authorization: Bearer" in received.replace(b"Authorization", b"authorization")
    assert len(received) > 2 * 2 * 4 * 1000


def test_no_piece_of_an_image_reaches_the_coordinator(received: bytes) -> None:
    for data in client_data(JOB).values():
        assert find_pieces(received, forms(data)) == []


def test_no_run_of_labels_reaches_the_coordinator(received: bytes) -> None:
    assert find_labels(received, label_orders(JOB)) == []


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("form", ["stored", "stored columns", "scaled", "ready", "ready columns"])
def test_the_search_finds_a_piece_of_an_image_in_a_leaky_body(received: bytes, form: str, place: str) -> None:
    data = next(iter(client_data(JOB).values()))
    assert data.inputs is not None
    raw = data.inputs[3].numpy()
    ready = data.input_batch([3]).numpy()[0, 0]
    images = {
        "stored": raw,
        "stored columns": raw.T,
        "scaled": raw.astype(np.float32) / 255,
        "ready": ready,
        "ready columns": ready.T,
    }
    # 40 pixels from an odd offset in the middle of the image, where there is no background
    piece = np.ascontiguousarray(images[form]).reshape(-1)[397:437].tobytes()
    at = {"first": 0, "middle": len(received) // 2 + 1, "last": len(received)}[place]
    assert find_pieces(received[:at] + piece + received[at:], forms(data))


def test_the_search_finds_images_inside_a_well_formed_update(received: bytes) -> None:
    data = next(iter(client_data(JOB).values()))
    body = save({"stem.0.weight": data.input_batch([0, 1])})
    assert find_pieces(received + body, forms(data))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
def test_the_search_finds_labels_inside_a_well_formed_update(received: bytes, dtype: torch.dtype) -> None:
    targets = next(iter(client_data(JOB).values())).targets
    assert targets is not None
    assert find_labels(received + save({"y": targets.to(dtype)}), label_orders(JOB))


def test_the_search_finds_labels_written_as_text(received: bytes) -> None:
    targets = next(iter(client_data(JOB).values())).targets
    assert targets is not None
    assert find_labels(received + repr(targets.tolist()).encode(), label_orders(JOB))


def test_the_devices_hold_only_the_part_of_the_data_that_their_stage_needs() -> None:
    """Inputs stay on the first device of a client and targets on the last; none is sent to the middle."""
    from fedmp.engine.client_plan import part_of
    from fedmp.engine.prepare import prepare

    setup = prepare(tiny_job(topology=topology(3), data=images(20))).clients["c0"]
    parts = [
        part_of(setup.own_samples, [setup.blueprints[stage] for stage in stages])
        for stages in setup.plan.placement
    ]
    assert parts[0].inputs is not None
    assert parts[0].targets is None
    assert parts[1] is None
    assert parts[2].inputs is None
    assert parts[2].targets is not None


def test_the_run_directory_holds_no_piece_of_an_image(tmp_path: Path) -> None:
    """It may be sent to colleagues: plans, pictures and checkpoints show counts of labels at most."""
    run(JOB, tmp_path / "run")
    written = b"\n".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    for data in client_data(JOB).values():
        assert find_pieces(written, forms(data)) == []
