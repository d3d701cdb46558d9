"""Transformed updates at the border and in the journal: decoded as the client means them, or refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors import safe_open
from safetensors.torch import load, save

from fedmp.client import HttpFederation, Wire
from fedmp.coordinator import Journal
from fedmp.errors import RefusedError
from fedmp.graph import StateSpec
from fedmp.records import DeviceReport
from fedmp.updates import BFloat16, Channel, Clip, Int8, Sign, TopK, Zstd
from tests.support.service import Coordinator, body, coordinator, digest_of, state, update

FULL = body(update(0))


def spec(name: str, shape: tuple[int, ...], *, is_trained: bool = True) -> StateSpec:
    kind = "parameter" if name.endswith("weight") else "buffer"
    dtype = torch.int64 if name.endswith("count") else torch.float32
    return StateSpec(name, (name,), shape, dtype, kind, True, is_trained and kind == "parameter")


SPECS = {
    one.name: one
    for one in (
        spec("big.weight", (40, 50)),
        spec("small.weight", (3,)),
        spec("frozen.weight", (10, 10), is_trained=False),
        spec("norm.mean", (100,)),
        spec("norm.count", ()),
    )
}
PUSHED = ("big.weight", "small.weight", "norm.mean", "norm.count")


def trained(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.tensor(7)
        if name == "norm.count"
        else torch.randn(SPECS[name].shape, generator=random) * 1e-2
        for name in PUSHED
    }


def wire(*transforms: object, downlink: tuple[object, ...] = ()) -> Wire:
    return Wire(
        "ann",
        Channel(transforms, SPECS, seed=3),
        Channel(downlink, SPECS, seed=3, direction="down"),
    )


def opened(folder: Path, ends: Wire, round: int = 1) -> Journal:
    journal = Journal(folder, SPECS, uplink=ends.uplink, downlink=ends.downlink)
    journal.open(round)
    return journal


def put(journal: Journal, payload: dict[str, torch.Tensor]) -> None:
    part = journal.temporary("ann", 0)
    part.write_bytes(save(payload, {"report": DeviceReport(num_examples=1).model_dump_json()}))
    journal.accept(part, "ann", 0, PUSHED)


@pytest.mark.parametrize(
    "transforms", [(), (Int8(),), (TopK(fraction=0.05), Int8()), (Clip(max_norm=0.1), Sign())]
)
def test_the_journal_keeps_what_came_and_gives_what_was_meant(
    tmp_path: Path, transforms: tuple[object, ...]
) -> None:
    ends, change = wire(*transforms), trained()
    payload, _ = ends.pack(change, {}, round=1)
    journal = opened(tmp_path, ends)
    put(journal, payload)
    whole = journal.update_of("ann", 1)
    assert whole is not None
    assert set(whole) == set(PUSHED)
    expected = ends.uplink.decode_all(payload, PUSHED, sender="ann", round=1)
    for name, tensor in expected.items():
        assert torch.equal(whole[name], tensor)
        assert (
            torch.equal(whole[name], change[name])
            or (name == "big.weight" and transforms)
            or (name == "small.weight" and isinstance(transforms[0], Clip))
        )
    with safe_open(next(tmp_path.rglob("ann.0.safetensors")), "pt") as kept:
        assert set(kept.keys()) == set(payload)


def test_buffers_counters_and_what_is_not_trained_travel_as_they_are() -> None:
    ends = wire(TopK(fraction=0.01), downlink=(BFloat16(),))
    assert list(ends.uplink.parts("norm.mean")) == ["norm.mean"]
    assert list(ends.uplink.parts("frozen.weight")) == ["frozen.weight"]
    assert list(ends.downlink.parts("frozen.weight")) == ["frozen.weight"]
    assert ends.downlink.parts("big.weight")["big.weight"].dtype == torch.bfloat16
    assert ends.uplink.name_of("big.weight:values") == "big.weight"


def test_a_clip_bounds_the_trained_parameters_of_the_whole_client() -> None:
    ends, change = wire(Clip(max_norm=0.05)), trained()
    half = {name: change[name] for name in ("big.weight", "norm.count")}
    rest = {name: change[name] for name in ("small.weight", "norm.mean")}
    squares = sum(float(change[name].double().square().sum()) for name in ("big.weight", "small.weight"))
    told = []

    def sum_over_devices(own: float) -> float:
        told.append(own)
        return squares

    parts = {**ends.pack(half, {}, round=1, sum_over_devices=sum_over_devices)[0]}
    parts |= ends.pack(rest, {}, round=1, sum_over_devices=sum_over_devices)[0]
    assert sum(told) == pytest.approx(squares)
    clipped = (
        sum(float(parts[name].double().square().sum()) for name in ("big.weight", "small.weight")) ** 0.5
    )
    assert clipped == pytest.approx(0.05, rel=1e-5)
    assert torch.equal(parts["norm.mean"], change["norm.mean"])
    assert torch.equal(parts["norm.count"], change["norm.count"])


def test_what_is_sent_does_not_depend_on_how_the_model_is_cut() -> None:
    ends, change = wire(TopK(fraction=0.1), Int8()), trained()
    whole, kept = ends.pack(change, {}, round=2)
    cut: dict[str, torch.Tensor] = {}
    cut_kept: dict[str, torch.Tensor] = {}
    for names in (("norm.count", "small.weight"), ("big.weight", "norm.mean")):
        payload, residual = ends.pack({name: change[name] for name in names}, {}, round=2)
        cut |= payload
        cut_kept |= residual
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    assert all(torch.equal(cut_kept[name], kept[name]) for name in kept)


def test_state_of_tensors_that_do_not_travel_this_round_stays() -> None:
    """A strategy may send fragments of a model in turn."""
    ends = wire(TopK(fraction=0.1))
    _, kept = ends.pack({"big.weight": trained()["big.weight"]}, {}, round=1)
    assert kept
    _, after = ends.pack(
        {"small.weight": trained()["small.weight"]}, {**kept, "own/x": torch.ones(1)}, round=2
    )
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"big.weight:values.scales": torch.full((1,), float("nan"))}, "not-finite", "holds NaN or infinity"),
        (
            {"big.weight:values.scales": torch.zeros(2)},
            "wrong-shape-or-dtype",
            r"must be torch.float32 \(1,\)",
        ),
        ({"big.weight:values.levels": torch.zeros(100)}, "wrong-shape-or-dtype", "must be torch.int8"),
        (
            {"big.weight:places": torch.zeros(5000, dtype=torch.uint8)},
            "wrong-shape-or-dtype",
            r"at most \(107,\), not torch.uint8 \(5000,\)",
        ),
        (
            {"big.weight:places": torch.full((100,), 254, dtype=torch.uint8)},
            "malformed-payload",
            "big.weight: an index is 25499, beyond the end of a tensor of 2000 numbers",
        ),
        ({"big.weight:values.scales": -torch.ones(1)}, "malformed-payload", "big.weight: a scale is -1"),
        ({"big.weight:values.scales": torch.full((1,), 3e38)}, "malformed-payload", "too large to be finite"),
        ({"big.weight:more": torch.zeros(1)}, "wrong-tensors", r"unknown \['big.weight:more'\]"),
        ({"big.weight": torch.zeros(40, 50)}, "wrong-tensors", r"unknown \['big.weight'\]"),
        ({"norm.count": torch.tensor(1.0)}, "wrong-shape-or-dtype", "norm.count must be torch.int64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_payload_that_no_encoder_makes_is_refused_before_it_is_acknowledged(
    tmp_path: Path, change: dict[str, torch.Tensor], reason: str, message: str
) -> None:
    ends = wire(TopK(fraction=0.05), Int8())
    payload, _ = ends.pack(trained(), {}, round=1)
    journal = opened(tmp_path, ends)
    with pytest.raises(RefusedError, match=message) as refused:
        put(journal, {**payload, **change})
    assert (refused.value.status, refused.value.reason) == (422, reason)
    assert not journal.has("ann", 0)


def test_a_journal_found_again_is_checked_by_the_same_rules(tmp_path: Path) -> None:
    ends = wire(TopK(fraction=0.05), Int8())
    put(opened(tmp_path, ends), ends.pack(trained(), {}, round=1)[0])
    assert opened(tmp_path, ends).found({"ann": [PUSHED]}) == {("ann", 0): ""}
    assert opened(tmp_path, wire(Int8())).found({"ann": [PUSHED]}) == {}


@pytest.mark.parametrize("downlink", [(BFloat16(),), (Int8(), Zstd()), (Zstd(),)])
def test_a_global_stage_goes_out_transformed_and_comes_in_the_same_for_all(
    tmp_path: Path, downlink: tuple[object, ...]
) -> None:
    ends = wire(downlink=downlink)
    model = {**trained(), "frozen.weight": torch.ones(10, 10)}
    journal = opened(tmp_path, ends, round=4)
    path = journal.global_stage(list(model), model, "key")
    got = ends.unpack(load(path.read_bytes()), round=4)
    payload, _ = ends.downlink.encode(model, {}, sender="", round=4)
    assert got.keys() == model.keys()
    for name, tensor in ends.downlink.decode_all(payload, model, sender="", round=4).items():
        assert torch.equal(got[name], tensor)
        assert torch.equal(got[name], model[name]) or name == "big.weight"
    small = journal.global_stage(list(model), model, "key", compressed=True)
    assert (small.suffix == ".zst") == any(isinstance(transform, Zstd) for transform in downlink)
    assert small.stat().st_size <= path.stat().st_size


# over HTTP


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(tmp_path) as running:
        yield running


def packed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize(
    ("content", "encoding", "status", "message"),
    [
        (packed(FULL), "zstd", 200, ""),
        (FULL, "identity", 200, ""),
        (packed(bytes(50_000_000)), "zstd", 413, "decompresses to 50000000 bytes, at most 4096 are allowed"),
        (packed(FULL)[:-3], "zstd", 422, "breaks off"),
        (packed(FULL) + b"tail", "zstd", 422, "after"),
        (FULL, "zstd", 422, "not compressed by zstd"),
        (packed(FULL), "gzip", 415, "compressed by zstd or not at all, not by 'gzip'"),
        (packed(FULL), "identity", 422, "not a safetensors file"),
    ],
)
def test_a_body_may_be_compressed_but_never_opens_to_more_than_is_allowed(
    server: Coordinator, content: bytes, encoding: str, status: int, message: str
) -> None:
    headers = {"content-digest": digest_of(content), "content-encoding": encoding}
    got, answer = server.ask("PUT", "/v1/rounds/1/update", "ann0", content, **headers)
    assert got == status
    assert message in answer.decode()
    assert server.files() == (["ann.0.safetensors"] if status == 200 else [])
    assert server.board.status().bytes_up == (len(content) if status == 200 else 0)


def test_an_upload_that_is_sent_again_compressed_is_the_same_upload(server: Coordinator) -> None:
    assert server.push("ann0", FULL)[0] == 200
    content = packed(FULL)
    headers = {"content-digest": digest_of(content), "content-encoding": "zstd"}
    assert server.ask("PUT", "/v1/rounds/1/update", "ann0", content, **headers)[0] == 200


def test_a_device_sends_and_fetches_compressed_bodies(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running:
        device = HttpFederation(running.service.url, "ann0")
        device.push(1, update(0, 0.5), DeviceReport(num_examples=2), zstd=Zstd())
        assert running.board.status().bytes_up < 600  # the report alone is filled up to 512
        pulled = device.pull(1, max_bytes=4096)
        assert torch.equal(pulled["a.weight"], state()["a.weight"])
