"""Bodies of the federation plane are safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load

from fedmp.client.body import stage_body, update_body
from fedmp.records import DeviceReport
from fedmp.updates import Zstd
from tests.support.jobs import assert_same

PAYLOAD = {
    "a.weight": torch.randn(7).to(torch.bfloat16),
    "count": torch.tensor(12345, dtype=torch.int64),
    "z.mask": torch.tensor([True, False, True]),
    "transposed": torch.randn(4, 3).T,
    "every second": torch.arange(10, dtype=torch.int32)[::2],
}


def test_tensors_arrive_as_they_are_however_they_lie_in_memory() -> None:
    assert_same(load(stage_body(PAYLOAD).content), PAYLOAD)


def test_a_report_travels_in_the_metadata(tmp_path: Path) -> None:
    report = DeviceReport(num_examples=3, generation="a-1")
    (tmp_path / "body").write_bytes(update_body(PAYLOAD, report).content)
    with safe_open(tmp_path / "body", framework="pt") as file:
        assert DeviceReport.model_validate_json(file.metadata()["report"]) == report


def test_a_compressed_body_says_so() -> None:
    body = update_body({"weight": torch.zeros(100_000)}, DeviceReport(num_examples=1), Zstd())
    assert body.is_compressed
    assert len(body.content) < 10_000
