"""Strangers, liars and sluggards over real sockets: refused in words, logged, counted, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from fedmp.client import HttpFederation
from fedmp.coordinator import Limits, Tls
from fedmp.coordinator.journal import Journal
from fedmp.errors import FederationError, RefusedError
from fedmp.identity import Credentials
from fedmp.identity.certificates import Authority
from fedmp.records import DeviceReport
from tests.support.service import Coordinator, body, coordinator, digest_of, specs, state, update

# a sluggard is cut after a quarter of a second instead of half a minute
IMPATIENT = Limits(head_timeout_s=0.25, stall_timeout_s=0.25, min_bytes_per_s=2000, idle_timeout_s=1)
SOON_S = 5.0

FULL = body(update(0))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(tmp_path / "journal", IMPATIENT) as running:
        yield running


def connect(server: Coordinator) -> socket.socket:
    address = urlsplit(server.service.url)
    return socket.create_connection((address.hostname, address.port), timeout=SOON_S)


def read_all(raw: socket.socket) -> bytes:
    """What comes until the other side closes."""
    answer = b""
    try:
        while part := raw.recv(4096):
            answer += part
    except ConnectionResetError:
        pass
    return answer


def head(length: int = len(FULL), digest: str = digest_of(FULL)) -> bytes:
    return (
        f"PUT /v1/rounds/1/update HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ann0\r\n"
        f"content-digest: {digest}\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def still_works(server: Coordinator) -> None:
    """Nothing of the refused request is left, and the true one is taken."""
    assert server.files() == []
    assert server.push("ann0", FULL) == (200, "")
    assert server.files() == ["ann.0.safetensors"]


def test_a_body_that_was_tampered_with_is_refused(
    server: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    changed = FULL[:-1] + bytes([FULL[-1] ^ 1])
    with caplog.at_level(logging.WARNING, "fedmp.coordinator"):
        status, answer = server.ask(
            "PUT", "/v1/rounds/1/update", "ann0", changed, **{"content-digest": digest_of(FULL)}
        )
    assert status == 400
    assert json.loads(answer)["reason"] == "tampered"
    assert server.service.metrics.refusals == {"tampered": 1}
    fields = caplog.records[-1].fields  # type: ignore[attr-defined]
    assert (fields["reason"], fields["client"], fields["device"], fields["route"]) == (
        *("tampered", "ann", "d0"),
        "/v1/rounds/{round}/update",
    )
    still_works(server)


@pytest.mark.parametrize(
    "announced", [None, "", "md5=:AAAA:", "sha-256=:AAAA:", "sha-256=:====:", "sha-256=AAAA", "sha-256=:é:"]
)
def test_a_body_without_a_sound_digest_is_refused(server: Coordinator, announced: str | None) -> None:
    headers = {} if announced is None else {"content-digest": announced}
    status, answer = server.ask("PUT", "/v1/rounds/1/update", "ann0", FULL, **headers)
    assert status == 400
    assert "content-digest: sha-256=:BASE64:" in json.loads(answer)["detail"]
    assert server.service.metrics.refusals == {"no-digest": 1}
    still_works(server)


@pytest.mark.parametrize(
    "sent",
    [b"", b"P", b"GET /health HTTP/1.1\r\nhost:", head()[:-2]],
    ids=["nothing", "a byte", "half", "all but the end"],
)
def test_a_head_that_does_not_come_is_cut(server: Coordinator, sent: bytes) -> None:
    with connect(server) as raw:
        raw.sendall(sent)
        started_s = time.monotonic()
        answer = read_all(raw)
    assert time.monotonic() - started_s < SOON_S
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"reason":"slow-head"' in answer
    assert server.service.metrics.refusals == {"slow-head": 1}
    still_works(server)


def test_a_head_that_trickles_is_cut(server: Coordinator) -> None:
    with connect(server) as raw:
        started_s = time.monotonic()
        try:
            while time.monotonic() - started_s < SOON_S:
                raw.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            pass
    assert time.monotonic() - started_s < SOON_S
    assert server.service.metrics.refusals == {"slow-head": 1}


def test_the_head_of_a_second_request_has_a_deadline_too(server: Coordinator) -> None:
    with connect(server) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        while b'"ok"}' not in raw.recv(4096):
            pass
        raw.sendall(b"GET /hea")
        answer = read_all(raw)
    assert b"HTTP/1.1 408" in answer


def test_a_connection_may_rest_between_two_requests(server: Coordinator) -> None:
    with connect(server) as raw:
        for _ in range(2):
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b'"ok"}'):
                answer += raw.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(2 * IMPATIENT.head_timeout_s)
    assert server.service.metrics.refusals == {}


def test_a_body_that_stops_coming_is_refused(server: Coordinator) -> None:
    with connect(server) as raw:
        raw.sendall(head() + FULL[:100])
        answer = read_all(raw)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"no byte of the body came for 0.25 s, after 100" in answer
    assert server.service.metrics.refusals == {"stalled": 1}
    still_works(server)


def test_a_body_that_trickles_is_refused(server: Coordinator) -> None:
    """A byte now and then keeps no upload alive: it must reach a rate."""
    with connect(server) as raw:
        raw.sendall(head())
        started_s = time.monotonic()
        try:
            for byte in FULL:
                raw.sendall(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - started_s < SOON_S
    assert server.service.metrics.refusals == {"stalled": 1}
    still_works(server)


def test_a_slow_body_that_gets_on_is_taken(tmp_path: Path) -> None:
    """However long it takes in all: what counts is progress."""
    limits = Limits(head_timeout_s=0.25, stall_timeout_s=0.5, min_bytes_per_s=10)
    with coordinator(tmp_path / "journal", limits) as server, connect(server) as raw:
        raw.sendall(head())
        for start in range(0, len(FULL), 50):
            raw.sendall(FULL[start : start + 50])
            time.sleep(0.15)
        assert len(FULL) // 50 * 0.15 > 2 * limits.stall_timeout_s
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")
        assert server.files() == ["ann.0.safetensors"]


def test_a_reader_that_does_not_read_is_cut(tmp_path: Path) -> None:
    with coordinator(tmp_path / "journal", IMPATIENT) as server:
        # as large as no socket buffer is
        (tmp_path / "journal" / "round-00001" / "global-stage0.safetensors").write_bytes(bytes(1 << 26))
        with connect(server) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            raw.sendall(b"GET /v1/rounds/1/stage HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ann0\r\n\r\n")
            deadline_s = time.monotonic() + SOON_S
            while not server.service.metrics.refusals and time.monotonic() < deadline_s:
                time.sleep(0.02)
        assert server.service.metrics.refusals == {"slow-reader": 1}


def test_many_sluggards_do_not_keep_a_device_out(server: Coordinator) -> None:
    sluggards = [connect(server) for _ in range(100)]
    try:
        for raw in sluggards:
            raw.sendall(b"PUT /v1/")
        started_s = time.monotonic()
        assert server.push("ann1", body(update(1)))[0] == 200
        assert time.monotonic() - started_s < SOON_S
    finally:
        for raw in sluggards:
            raw.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/rounds/one/stage", 422),
        ("GET", f"/v1/rounds/{'9' * 5000}/stage", 422),
        ("GET", "/v1/rounds/1%00/stage", 422),
        ("GET", "/v1/nothing", 404),
        ("DELETE", "/v1/rounds/1/update", 405),
        ("PUT", "/v1/instruction", 405),
    ],
)
def test_a_request_for_what_is_not_there_is_refused(
    server: Coordinator, method: str, path: str, status: int
) -> None:
    answered, answer = server.ask(method, path, "ann0")
    assert answered == status
    assert set(json.loads(answer)) == {"detail", "reason"}


def test_a_request_that_is_no_http_is_refused(server: Coordinator) -> None:
    with connect(server) as raw:
        raw.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert read_all(raw).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("payload", "detail"),
    [
        (b"{", "not a valid ProgressReport: Invalid JSON"),
        (b'{"round": 1}', "samples_done: Field required"),
        (b"[" * 100_000, "not a valid ProgressReport: Invalid JSON"),
        (b'{"round": 1e999, "samples_done": 1, "samples_total": 1, "loss": 0}', "round:"),
        (b"\xff", "not a valid ProgressReport: Invalid JSON"),
    ],
)
def test_a_malformed_message_is_refused_with_what_is_wrong(
    server: Coordinator, payload: bytes, detail: str
) -> None:
    status, answer = server.ask("POST", "/v1/progress", "ann0", payload)
    assert status == 422
    assert detail in json.loads(answer)["detail"]


def test_a_full_disk_is_said_and_loses_nothing(server: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "accept", full)
    assert server.push("ann0", FULL) == (
        507,
        "the coordinator cannot write its journal: No space left on device",
    )
    monkeypatch.undo()
    still_works(server)


def test_metrics_tell_what_happened(server: Coordinator) -> None:
    server.push("ann0", FULL)
    server.push("ann1", FULL)
    server.board.lost("device d1 of ann is away")
    status, answer = server.ask("GET", "/metrics")
    text = answer.decode()
    assert status == 200
    for line in (
        'fedmp_refusals_total{reason="wrong-tensors"} 1.0',
        'fedmp_requests_total{route="/v1/rounds/{round}/update",status="200"} 1.0',
        f"fedmp_update_bytes_total {float(len(FULL))}",
        "fedmp_round 1.0",
        "fedmp_round_open 1.0",
        "fedmp_cohort_clients 2.0",
        "fedmp_devices_lost_total 1.0",
        "fedmp_rounds_begun_anew_total 0.0",
        "fedmp_reported_clients 0.0",
        'fedmp_device_silent_seconds{client="ann",device="d0"}',
    ):
        assert line in text


def test_health_and_readiness_are_two_things(server: Coordinator) -> None:
    assert server.ask("GET", "/health")[0] == 200
    assert server.ask("GET", "/ready") == (
        200,
        b'{"round":1,"state":"open","clients":2,"reported":0}',
    )
    server.board.close_round()
    status, answer = server.ask("GET", "/ready")
    assert (status, json.loads(answer)["state"]) == (503, "between rounds")
    assert server.ask("GET", "/health")[0] == 200


def test_a_pull_that_breaks_off_is_taken_up_again(tmp_path: Path) -> None:
    """Through a relay that lets 300 bytes of each answer pass."""
    with coordinator(tmp_path / "journal") as server, _Breaking(server, 300) as relay:
        device = HttpFederation(f"http://127.0.0.1:{relay.port}", "ann0", patience_s=10)
        pulled = device.pull(1)
        assert all(torch.equal(pulled[name], state()[name]) for name in ("a.weight", "a.mean"))
        assert relay.connections > 1
        assert b"range: bytes=" in relay.asked.lower()


class _Breaking:
    """A relay that breaks each answer off after so many bytes."""

    def __init__(self, server: Coordinator, num_bytes: int) -> None:
        self._target = urlsplit(server.service.url)
        self._num_bytes = num_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.asked = b""

    def __enter__(self) -> _Breaking:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with near, socket.create_connection((self._target.hostname, self._target.port)) as far:
                asked = near.recv(65536)
                self.asked += asked
                far.sendall(asked)
                left = self._num_bytes
                while left and (part := far.recv(left)):
                    near.sendall(part)
                    left -= len(part)


class TestTls:
    """The same service behind certificates."""

    @pytest.fixture
    def authority(self) -> Authority:
        return Authority.make()

    @pytest.fixture
    def secure(self, tmp_path: Path, authority: Authority) -> Iterator[Callable[..., Coordinator]]:
        """Starts a coordinator with a certificate for 127.0.0.1."""
        with contextlib.ExitStack() as stack:

            def start(*, mutual: bool = False) -> Coordinator:
                certificate, key, ca = (tmp_path / name for name in ("s.pem", "s.key", "ca.pem"))
                authority.issue_server(["127.0.0.1"]).save(certificate, key)
                ca.write_text(authority.pem)
                tls = Tls(certificate, key, ca if mutual else None)
                return stack.enter_context(coordinator(tmp_path / "journal", tls=tls))

            yield start

    def device(
        self, server: Coordinator, authority: Authority, *, shown_by: Authority | None = None
    ) -> HttpFederation:
        own = shown_by and shown_by.issue_device("ann", "d0")
        credentials = Credentials(
            client="ann",
            device="d0",
            token="t" * 40,
            ca=authority.pem,
            certificate=own and own.certificate,
            key=own and own.key,
        )
        return HttpFederation(server.service.url, "ann0", context=credentials.ssl_context(), patience_s=0.3)

    def test_a_device_pulls_and_pushes_over_tls(
        self, secure: Callable[..., Coordinator], authority: Authority
    ) -> None:
        server = secure()
        assert server.service.url.startswith("https://")
        device = self.device(server, authority)
        assert sorted(device.pull(1)) == ["a.mean", "a.weight"]
        device.push(1, update(0), DeviceReport(num_examples=1))
        assert server.files() == ["ann.0.safetensors", "global-stage0.safetensors"]

    def test_a_device_gives_up_at_once_on_a_coordinator_that_it_cannot_trust(
        self, secure: Callable[..., Coordinator]
    ) -> None:
        device = self.device(secure(), Authority.make())
        with pytest.raises(FederationError, match=r"no secure connection .* certificate verify failed"):
            device.instruction()

    def test_mutual_tls_keeps_strangers_out_before_they_say_a_word(
        self, secure: Callable[..., Coordinator], authority: Authority
    ) -> None:
        server = secure(mutual=True)
        assert self.device(server, authority, shown_by=authority).instruction().kind == "train"
        for shown_by in (None, Authority.make()):
            with pytest.raises(FederationError):
                self.device(server, authority, shown_by=shown_by).instruction()
        assert server.service.metrics.refusals == {}

    def test_plain_http_to_a_tls_port_is_not_answered(self, secure: Callable[..., Coordinator]) -> None:
        with connect(secure()) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"ok" not in read_all(raw)


def test_a_refusal_reaches_the_device_with_its_reason(server: Coordinator) -> None:
    with pytest.raises(RefusedError, match="missing .*a.mean") as refused:
        HttpFederation(server.service.url, "ann0").push(1, update(1), DeviceReport(num_examples=1))
    assert (refused.value.status, refused.value.reason) == (422, "wrong-tensors")
    assert set(specs()) == set(state())
