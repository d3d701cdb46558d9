"""Bodies of the federation plane are safetensors files, without a copy of their tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from fedmp.client.body import stage_body, update_body
from fedmp.records import DeviceReport
from fedmp.updates import Zstd

PAYLOAD = {
    "b.weight": torch.randn(3, 5),
    "a.weight": torch.randn(7).to(torch.bfloat16),
    "a.bias": torch.randn(()),
    "z.mask": torch.tensor([True, False, True]),
    "count": torch.tensor(12345, dtype=torch.int64),
    "half": torch.randn(2, 2).to(torch.float16),
    "double": torch.randn(3, dtype=torch.float64),
    "phase": torch.randn(2, dtype=torch.complex64),
    "empty": torch.empty(0, 4),
    "signs/ä": torch.tensor([[-1, 1]], dtype=torch.int8),
    "transposed": torch.randn(4, 3).T,
    "every second": torch.arange(10, dtype=torch.int32)[::2],
    "tiny": torch.randn(5).to(torch.float8_e5m2),
}


def test_safetensors_reads_from_a_body_what_it_would_have_written_itself() -> None:
    """In as many bytes; only the order of tensors whose numbers are equally wide may differ."""
    expected = save({name: tensor.contiguous() for name, tensor in PAYLOAD.items()})
    made = b"".join(stage_body(PAYLOAD).pieces)
    assert len(made) == len(expected)
    read, wanted = load(made), load(expected)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_every_tensor_of_a_body_is_aligned_to_its_numbers() -> None:
    body = stage_body(PAYLOAD)
    begin, header = len(body.pieces[0]) + len(body.pieces[1]), json.loads(bytes(body.pieces[1]))
    for name, tensor in PAYLOAD.items():
        assert (begin + header[name]["data_offsets"][0]) % tensor.element_size() == 0, name


def test_a_report_travels_in_the_metadata(tmp_path: Path) -> None:
    report = DeviceReport(num_examples=3, generation="a-1")
    (tmp_path / "body").write_bytes(b"".join(update_body(PAYLOAD, report).pieces))
    with safe_open(tmp_path / "body", framework="pt") as file:
        assert DeviceReport.model_validate_json(file.metadata()["report"]) == report


def test_a_body_holds_no_copy_of_its_tensors() -> None:
    tensor = torch.zeros(1000)
    body = stage_body({"weight": tensor})
    tensor[0] = 1.0
    assert load(b"".join(body.pieces))["weight"][0] == 1.0
    assert body.num_bytes == len(b"".join(body.pieces))
    assert body.sha256() == hashlib.sha256(b"".join(body.pieces)).digest()


def test_a_compressed_body_is_one_piece_and_says_so() -> None:
    body = update_body({"weight": torch.zeros(100_000)}, DeviceReport(num_examples=1), Zstd())
    assert body.is_compressed
    assert len(body.pieces) == 1
    assert body.num_bytes < 10_000
