"""Random requests by the service's own OpenAPI description, and random bytes for its decoders.

Whatever comes: an answer, soon, below 500; nothing in the journal; no growth in memory.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psutil
import pytest

from fedmp.coordinator import Journal
from fedmp.coordinator.guard import Limits
from fedmp.errors import RefusedError
from tests.support.service import Coordinator, body, coordinator, digest_of, specs, update

SOON_S = 5.0
FULL = body(update(0))
TOKENS = (*["ann0", "ann1", "bob0"] * 5, "ann9", "", "x" * 9000, "\x7f", "ann0 ann0")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(
        tmp_path / "journal", Limits(head_timeout_s=1, stall_timeout_s=1, long_poll_s=0.1)
    ) as running:
        yield running


def described(server: Coordinator) -> list[tuple[str, str, str]]:
    """Every operation of the description: method, path, and the kind of its body if it takes one."""
    status, answer = server.ask("GET", "/openapi.json")
    assert status == 200
    operations = []
    for path, methods in json.loads(answer)["paths"].items():
        for method, operation in methods.items():
            kinds = list(operation.get("requestBody", {}).get("content", {""}))
            operations.append((method.upper(), path, kinds[0]))
    return operations


def make_request(operation: tuple[str, str, str], dice: random.Random) -> bytes:
    """One request, mostly well-formed as HTTP, with a body of any length and any announcement of it."""
    method, path, kind = operation
    path = path.replace(
        "{round}", quote(str(dice.choice([0, 1, 1, 1, 2, -1, 10**30, "x", "1.0", "", "%00"])))
    )
    if dice.random() < 0.1:
        method = dice.choice(["GET", "PUT", "POST", "HEAD", "OPTIONS", "TRACE", "BREW"])
    content = b""
    if kind or dice.random() < 0.2:
        content = dice.choice([_any_json, _any_bytes, _mutated])(dice)
    lines = [f"{method} {path} HTTP/1.1", "host: x"]
    if dice.random() < 0.95:
        lines.append(
            f"authorization: {dice.choice(['Bearer', 'Bearer', 'bearer', 'Basic'])} {dice.choice(TOKENS)}"
        )
    if dice.random() < 0.8:
        lines.append(f"content-digest: {digest_of(content)}")
    if dice.random() < 0.2:
        lines.append(f"range: bytes={dice.choice(['0-', '5-3', '-1', 'x', '1-2,3-4', '99999999-'])}")
    announced = dice.choice([len(content)] * 8 + [0, len(content) + 5, 10**12])
    if content and dice.random() < 0.2:
        lines.append("transfer-encoding: chunked")
        content = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in _pieces(content)) + b"0\r\n\r\n"
    elif content or announced:
        lines.append(f"content-length: {announced}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def answer_to(server: Coordinator, request: bytes) -> int | None:
    """The status of the answer; None if the connection was closed without one."""
    address = urlsplit(server.service.url)
    with socket.create_connection((address.hostname, address.port), timeout=SOON_S) as raw:
        try:
            raw.sendall(request)
            raw.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before the end
        answer = b""
        try:
            while b"\r\n" not in answer and (part := raw.recv(65536)):
                answer += part
        except ConnectionResetError:
            return None
    return int(answer.split()[1]) if answer else None


def bombard(server: Coordinator, *, num_requests: int, seed: int) -> None:
    dice = random.Random(seed)
    operations = [each for each in described(server) if each[1] != "/ready"]  # whose 503 is its meaning
    for number in range(num_requests):
        request = make_request(dice.choice(operations), dice)
        started_s = time.monotonic()
        status = answer_to(server, request)
        assert status is None or status < 500, f"request {number} of seed {seed}: {request[:300]!r}"
        assert time.monotonic() - started_s < SOON_S, f"request {number} of seed {seed}: {request[:300]!r}"
    deadline_s = time.monotonic() + SOON_S  # the last ones may not be over when their connection is
    while any(name.endswith(".part") for name in server.files()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    # a change of a value is a sound update of another value; nothing else is there, no half one either
    assert set(server.files()) <= {
        "ann.0.safetensors",
        "bob.0.safetensors",
        "global-stage0.safetensors",
        "global-stage1.safetensors",
    }
    for path in server.folder.rglob("*.0.safetensors"):
        path.unlink()
    assert server.push("ann0", FULL)[0] == 200


def test_no_request_breaks_the_service(server: Coordinator) -> None:
    bombard(server, num_requests=300, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_thousand_requests_neither_break_the_service_nor_fill_its_memory(
    server: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "fedmp")  # pytest would keep every line of the log
    sizes = []
    for seed in range(10):
        bombard(server, num_requests=2000, seed=seed)
        (server.folder / "round-00001" / "ann.0.safetensors").unlink()
        sizes.append(_memory_bytes())
    assert sizes[-1] - sizes[2] < 16 << 20, [size >> 20 for size in sizes]


def decode(journal: Journal, content: bytes) -> bool:
    part = journal.temporary("ann", 0)
    part.write_bytes(content)
    try:
        journal.accept(part, "ann", 0, ("a.weight", "a.mean"))
    except RefusedError:
        part.unlink()
        return False
    return True


def throw_at(journal: Journal, *, num_bodies: int, seed: int) -> int:
    dice = random.Random(seed)
    return sum(
        decode(journal, dice.choice([_mutated, _mutated, _any_bytes, _any_header])(dice))
        for _ in range(num_bodies)
    )


def test_the_tensor_decoder_takes_or_refuses_and_raises_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path, specs())
    journal.open(1)
    taken = throw_at(journal, num_bodies=1500, seed=2)
    assert 0 < taken < 1500, "a change of a value is sound, one of the structure is not"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tensor_decoder_does_not_fill_the_memory(tmp_path: Path) -> None:
    journal = Journal(tmp_path, specs())
    journal.open(1)
    sizes = []
    for seed in range(10):
        throw_at(journal, num_bodies=5000, seed=seed)
        sizes.append(_memory_bytes())
    assert sizes[-1] - sizes[2] < 16 << 20, [size >> 20 for size in sizes]


def _memory_bytes() -> int:
    gc.collect()
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _any_bytes(dice: random.Random) -> bytes:
    return dice.randbytes(dice.choice([0, 1, 7, 8, 9, 100, 4096, 5000, 70_000]))


def _any_json(dice: random.Random) -> bytes:
    def value(depth: int) -> Any:
        kind = dice.randrange(8 if depth < 4 else 6)
        if kind < 6:
            return dice.choice(
                [None, True, 0, -1, 10**400, 1.5, "x", "é" * 50, float("inf"), float("nan"), ""]
            )
        names = ["round", "samples_done", "samples_total", "loss", "kind", "message", "host", "port", "x"]
        if kind == 6:
            return {dice.choice(names): value(depth + 1) for _ in range(dice.randrange(7))}
        return [value(depth + 1) for _ in range(dice.randrange(4))]

    return json.dumps(value(0)).encode()


def _mutated(dice: random.Random) -> bytes:
    """A sound update with a few bytes changed, cut off or added."""
    content = bytearray(FULL)
    for _ in range(dice.randint(1, 4)):
        content[dice.randrange(len(content))] = dice.randrange(256)
    return bytes(content[: dice.choice([len(content)] * 4 + [dice.randrange(len(content))])])


def _any_header(dice: random.Random) -> bytes:
    """A header that lies about what follows."""
    end = dice.choice([24, 36, 2**31, 2**63, 2**64, -1, 0])
    entry = {
        "dtype": dice.choice(["F32", "F64", "I64", "BOOL", "U8", "F8_E4M3", "X"]),
        "shape": dice.choice([[3, 2], [3], [], [2**32, 2**32], [-1], [0], [6]]),
        "data_offsets": [dice.choice([0, 12, 24, 2**40]), end],
    }
    header = json.dumps({"a.weight": entry, "a.mean": entry, "__metadata__": {"report": "{}"}}).encode()
    length = dice.choice([len(header)] * 5 + [0, 2**63, len(header) - 1])
    return struct.pack("<Q", length) + header + bytes(36)


def _pieces(content: bytes) -> list[bytes]:
    return [content[start : start + 1000] for start in range(0, len(content), 1000)]
