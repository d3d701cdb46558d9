"""The coordinator's border: what it refuses, what it says, and that nothing of it stays."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedmp.client import HttpFederation
from fedmp.coordinator import Board, CoordinatorService, GlobalModel, Journal
from fedmp.errors import ConfigError, FederationError, RefusedError
from fedmp.records import Address, DeviceReport, FailureReport, ProgressReport
from tests.support.service import Coordinator, body, coordinator, digest_of, members, specs, state, update


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(tmp_path / "journal") as running:
        yield running


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """One coordinator for many requests that must change nothing."""
    with coordinator(tmp_path_factory.mktemp("unmoved")) as running:
        yield running


FULL = body(update(0))
DIGEST = b"content-digest: " + digest_of(FULL).encode() + b"\r\n"


def with_tensor(stage: int, name: str, tensor: torch.Tensor) -> bytes:
    return body({**update(stage), name: tensor})


REQUESTS = [
    ("GET", "/v1/instruction"),
    ("GET", "/v1/rounds/1/stage"),
    ("PUT", "/v1/rounds/1/update"),
    ("POST", "/v1/progress"),
    ("POST", "/v1/failure"),
    ("PUT", "/v1/address"),
    ("GET", "/v1/address"),
]


@pytest.mark.parametrize(("method", "path"), REQUESTS)
@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer ann9"}, {"authorization": "Bearer "}, {"authorization": "Basic ann0"}],
    ids=["none", "unknown", "empty", "another scheme"],
)
def test_a_request_without_a_known_credential_is_refused(
    unmoved: Coordinator, method: str, path: str, headers: dict[str, str]
) -> None:
    status, answer = unmoved.ask(method, path, payload=b"{}" if method != "GET" else None, **headers)
    assert status == 401
    assert json.loads(answer) == {"detail": "unknown credential", "reason": "unknown-credential"}
    assert unmoved.files() == []


def test_a_stage_is_handed_out_under_its_names_in_the_whole_model(server: Coordinator) -> None:
    status, answer = server.ask("GET", "/v1/rounds/1/stage", "ann1")
    assert status == 200
    tensors = load(answer)
    assert sorted(tensors) == ["b.count", "b.weight"]
    assert all(torch.equal(tensor, state()[name]) for name, tensor in tensors.items())


def test_a_valid_update_is_in_the_journal_when_it_is_acknowledged(server: Coordinator) -> None:
    assert server.push("ann0", body(update(0))) == (200, "")
    assert server.files() == ["ann.0.safetensors"]
    assert server.board.missing() == {"ann": [1], "bob": [0, 1]}


@pytest.mark.parametrize(
    ("round", "detail"),
    [
        (0, "round 0 is over; round 1 is open"),
        (2, "round 2 is not open; round 1 is"),
        (99, "round 99 is not open; round 1 is"),
    ],
)
def test_a_round_that_is_not_open_is_refused_and_the_open_one_named(
    server: Coordinator, round: int, detail: str
) -> None:
    assert server.push("ann0", body(update(0)), round) == (409, detail)
    assert server.ask("GET", f"/v1/rounds/{round}/stage", "ann0")[0] == 409
    assert server.files() == []


def test_between_two_rounds_no_update_is_taken_and_no_stage_given(server: Coordinator) -> None:
    server.board.close_round()
    server.journal.close()
    assert server.push("ann0", body(update(0))) == (409, "round 1 is over")
    assert server.ask("GET", "/v1/rounds/1/stage", "ann0")[0] == 409
    assert server.push("ann0", body(update(0)), 2) == (503, "round 2 is not open yet")


def test_an_update_of_a_client_outside_the_cohort_is_refused(server: Coordinator) -> None:
    server.board.open_round(1, ("ann",))
    assert server.push("bob0", body(update(0))) == (409, "client bob is not in the cohort of round 1")
    assert server.files() == []


def test_a_body_announced_as_too_long_is_refused_before_it_is_read(server: Coordinator) -> None:
    address = urlsplit(server.service.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as raw:
        raw.sendall(
            b"PUT /v1/rounds/1/update HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ann0\r\n"
            + DIGEST
            + b"content-length: 4097\r\n\r\n"
        )
        answer = raw.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")
    assert server.files() == []


def test_a_streamed_body_that_grows_too_long_is_refused(server: Coordinator) -> None:
    address = urlsplit(server.service.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as raw:
        raw.sendall(
            b"PUT /v1/rounds/1/update HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ann0\r\n"
            + DIGEST
            + b"transfer-encoding: chunked\r\n\r\n"
        )
        for _ in range(5):
            raw.sendall(b"400\r\n" + bytes(1024) + b"\r\n")
        answer = b""
        while b"}" not in answer and (part := raw.recv(4096)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"more than 4096 bytes" in answer
    assert server.files() == []


def test_a_body_that_breaks_off_leaves_nothing_and_the_service_goes_on(server: Coordinator) -> None:
    address = urlsplit(server.service.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as raw:
        raw.sendall(
            b"PUT /v1/rounds/1/update HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ann0\r\n"
            + DIGEST
            + b"content-length: 2000\r\n\r\n"
            + bytes(1000)
        )
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(4096):  # until the server has closed its side
            pass
    assert server.push("ann1", body(update(1)))[0] == 200
    assert server.files() == ["ann.1.safetensors"]


BAD_BODIES = {
    "empty": (b"", "not a safetensors file"),
    "garbage": (b"\x80\x04\x95 no tensors at all" * 9, "not a safetensors file"),
    "header alone": (FULL[: 8 + struct.unpack("<Q", FULL[:8])[0]], "not a safetensors file"),
    "truncated": (FULL[:-1], "not a safetensors file"),
    "trailing bytes": (FULL + b"\0", "not a safetensors file"),
    "huge header": (struct.pack("<Q", 1 << 60) + FULL[8:], "not a safetensors file"),
    "NaN": (with_tensor(0, "a.weight", torch.full((3, 2), float("nan"))), "a.weight holds NaN or infinity"),
    "one NaN": (
        with_tensor(0, "a.weight", torch.tensor([[0, 0], [0, float("nan")], [0, 0]])),
        "a.weight holds NaN or infinity",
    ),
    "infinity": (
        with_tensor(0, "a.mean", torch.tensor([0, float("-inf"), 0])),
        "a.mean holds NaN or infinity",
    ),
    "shape": (with_tensor(0, "a.weight", torch.zeros(2, 3)), "a.weight must be torch.float32 (3, 2), not"),
    "more dims": (with_tensor(0, "a.weight", torch.zeros(3, 2, 1)), "a.weight must be torch.float32 (3, 2)"),
    "dtype": (with_tensor(0, "a.weight", torch.zeros(3, 2).double()), "not torch.float64"),
    "half": (with_tensor(0, "a.weight", torch.zeros(3, 2).bfloat16()), "not torch.bfloat16"),
    "missing": (body({"a.weight": torch.zeros(3, 2)}), "missing ['a.mean']"),
    "unknown": (with_tensor(0, "c", torch.zeros(1)), "unknown ['c']"),
    "no tensors": (body({}), "missing ['a.mean', 'a.weight']"),
    "other stage": (body(update(1)), "unknown ['b.count', 'b.weight']"),
    "no report": (save(update(0)), "report is not valid"),
    "report is no JSON": (body(update(0), "nothing"), "report is not valid"),
    "unknown field": (body(update(0), '{"num_examples": 3, "price": 1}'), "report is not valid"),
    "negative examples": (body(update(0), '{"num_examples": -3}'), "report is not valid"),
    "no examples": (body(update(0), '{"num_examples": 0}'), "at least 1"),
    "absurd examples": (body(update(0), '{"num_examples": 1' + "0" * 400 + "}"), "report"),
    "loss NaN": (body(update(0), '{"num_examples": 3, "loss_sum": NaN}'), "report"),
    "weight infinite": (body(update(0), '{"num_examples": 3, "weight": Infinity}'), "report"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_malformed_update_is_refused_with_a_reason_and_leaves_nothing(
    unmoved: Coordinator, case: str
) -> None:
    payload, reason = BAD_BODIES[case]
    status, detail = unmoved.push("ann0", payload)
    assert status == 422
    assert reason in detail
    assert unmoved.files() == []
    assert unmoved.board.missing() == {"ann": [0, 1], "bob": [0, 1]}


def test_a_device_may_try_again_after_a_refusal(server: Coordinator) -> None:
    assert server.push("ann0", FULL[:-1])[0] == 422
    assert server.push("ann0", FULL)[0] == 200
    assert server.files() == ["ann.0.safetensors"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_corruption_of_an_update_gets_past_the_check_or_breaks_it(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Whatever a peer sends, the journal takes a sound update or refuses it; nothing else is raised."""
    corrupt = bytearray(FULL)
    for _ in range(data.draw(st.integers(1, 4))):
        corrupt[data.draw(st.integers(0, len(corrupt) - 1))] = data.draw(st.integers(0, 255))
    journal = Journal(tmp_path, specs())
    journal.open(1)
    part = journal.temporary("ann", 0)
    part.write_bytes(bytes(corrupt[: data.draw(st.integers(0, len(corrupt)))]))
    try:
        journal.accept(part, "ann", 0, ("a.weight", "a.mean"))
    except RefusedError:
        return
    taken = load((tmp_path / "round-00001" / "ann.0.safetensors").read_bytes())
    assert {name: tensor.shape for name, tensor in taken.items()} == {"a.weight": (3, 2), "a.mean": (3,)}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in taken.values())


def test_the_same_push_again_is_acknowledged_again_and_counted_once(server: Coordinator) -> None:
    """An acknowledgement may get lost, so a repeated push is no error; a replayed one changes nothing."""
    assert [server.push("ann0", FULL)[0] for _ in range(3)] == [200] * 3
    assert server.board.bytes_up == len(FULL)
    assert server.files() == ["ann.0.safetensors"]


def test_another_update_of_the_same_stage_and_round_is_refused(server: Coordinator) -> None:
    assert server.push("ann0", FULL)[0] == 200
    assert server.push("ann0", body(update(0, 2.0))) == (
        409,
        "another update of ann/d0 for round 1 is in the journal already",
    )
    kept = load((server.folder / "round-00001" / "ann.0.safetensors").read_bytes())
    assert torch.equal(kept["a.mean"], torch.ones(3)), "the first one counts"
    assert server.board.bytes_up == len(FULL)


def test_the_same_push_many_times_at_once_is_counted_once(server: Coordinator) -> None:
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(server.push("ann0", FULL)[0]), daemon=True)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 8
    assert server.board.bytes_up == len(FULL)
    assert server.files() == ["ann.0.safetensors"]


def test_a_device_cannot_push_the_stage_of_another_device(server: Coordinator) -> None:
    """The credential says whose update it is; a body for another stage does not fit."""
    status, detail = server.push("ann1", body(update(0)))
    assert status == 422
    assert "missing ['b.count', 'b.weight'], unknown ['a.mean', 'a.weight']" in detail
    assert server.board.missing() == {"ann": [0, 1], "bob": [0, 1]}


def test_a_clients_first_device_publishes_its_address_for_that_client_alone(server: Coordinator) -> None:
    address = Address(host="10.0.0.1", port=2900, secret="s")
    HttpFederation(server.service.url, "ann0").publish_address(address)
    assert HttpFederation(server.service.url, "ann1").address() == address
    assert HttpFederation(server.service.url, "bob1").address() is None


def test_only_a_clients_first_device_may_publish_an_address(server: Coordinator) -> None:
    with pytest.raises(RefusedError, match="only a client's first device") as refused:
        HttpFederation(server.service.url, "ann1").publish_address(Address(host="x", port=1))
    assert refused.value.status == 403


@pytest.mark.parametrize("path", ["/v1/progress", "/v1/failure"])
def test_a_malformed_message_is_refused(server: Coordinator, path: str) -> None:
    for payload in (b"", b"not json", b'{"round": "one"}', b"[]", b"\xff\xfe"):
        assert server.ask("POST", path, "ann0", payload)[0] == 422


def test_a_message_that_is_too_long_is_refused(server: Coordinator) -> None:
    payload = FailureReport(kind="x", message="m" * (2 << 20)).model_dump_json().encode()
    assert server.ask("POST", "/v1/failure", "ann0", payload)[0] == 413
    assert server.board.wait_for_cohort(timeout_s=0) is False, "no failure was noted"


def test_progress_of_the_open_round_is_shown_and_of_another_one_is_not(server: Coordinator) -> None:
    report = ProgressReport(round=1, samples_done=3, samples_total=9, loss=0.5)
    device = HttpFederation(server.service.url, "ann1")
    assert device.progress(report)
    assert device.progress(report.model_copy(update={"round": 7, "samples_done": 9}))  # begun ahead, perhaps
    assert server.board.progress() == {"ann": report}


def test_a_device_whose_round_was_closed_without_it_is_told_not_to_go_on(server: Coordinator) -> None:
    report = ProgressReport(round=1, samples_done=3, samples_total=9, loss=0.5)
    ann, bob = HttpFederation(server.service.url, "ann1"), HttpFederation(server.service.url, "bob1")
    late = server.board.close_round(["ann"], oldest=1)
    assert late == {"bob": 1}
    assert bob.progress(report), "its update will count for a later round"
    assert not ann.progress(report)
    server.board.close_round()
    assert not bob.progress(report)


def test_an_instruction_is_held_back_until_there_is_news(server: Coordinator) -> None:
    server.board.close_round()
    device = HttpFederation(server.service.url, "ann0")
    open_round = partial(server.board.open_round, 1, ("ann",))
    assert asked_before(open_round, lambda: device.instruction().kind) == "train"


def test_an_address_is_held_back_until_the_generation_that_is_wanted_has_one(server: Coordinator) -> None:
    first, other = (HttpFederation(server.service.url, f"ann{rank}") for rank in (0, 1))
    old, new = (Address(host="h", port=1, secret=str(n), number=n) for n in (0, 1))
    first.publish_address(old)
    assert other.address(1) == old  # what there is, for whom does not wait
    assert asked_before(partial(first.publish_address, new), lambda: other.address(1, wait_s=10)) == new


def asked_before(event: Callable[[], None], ask: Callable[[], object]) -> object:
    """The answer to a question that was asked before the event; it comes long before any long poll is over."""
    asked = threading.Event()
    answers: list[object] = []

    def wait() -> None:
        asked.set()
        answers.append(ask())

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    asked.wait()
    event()
    thread.join(timeout=5)
    return answers[0] if answers else None


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_head(server: Coordinator) -> None:
    """With Nagle's algorithm every one on a kept connection would take 40 ms, Linux's shortest delay."""
    federation = HttpFederation(server.service.url, "ann0")
    times_s = []
    for _ in range(10):
        started_s = time.perf_counter()
        federation.instruction()
        times_s.append(time.perf_counter() - started_s)
    assert min(times_s[1:]) < 0.03, times_s  # the shortest, since the machine may be busy


def test_an_address_in_use_is_named_with_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        board, journal = Board(members()), Journal(Path("unused"), specs())
        with pytest.raises(
            ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*in use.*engine\.port=0"
        ):
            CoordinatorService(board, journal, GlobalModel(specs(), state()), port=port)


def test_a_device_whose_coordinator_is_away_says_so_after_its_retries() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    device = HttpFederation(f"http://127.0.0.1:{port}", "ann0", patience_s=0.2)
    with pytest.raises(FederationError, match=f"coordinator at http://127.0.0.1:{port} does not answer"):
        device.instruction()


def test_what_a_device_pulls_and_pushes_arrives_bit_for_bit(server: Coordinator) -> None:
    device = HttpFederation(server.service.url, "bob0")
    pulled = device.pull(1)
    assert all(torch.equal(pulled[name], state()[name]) for name in ("a.weight", "a.mean"))
    odd = {"a.weight": torch.arange(6.0).reshape(2, 3).T / 7, "a.mean": torch.full((3,), 1e-42)}
    device.push(1, odd, DeviceReport(num_examples=2, loss_sum=0.1))
    kept = load((server.folder / "round-00001" / "bob.0.safetensors").read_bytes())
    assert all(torch.equal(kept[name], odd[name]) for name in odd)
