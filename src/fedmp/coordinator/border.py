"""The border of the federation plane: bodies as they come in, checked while they come.

A body must get on (no peer holds a connection by trickling), stay within its length, and have the SHA-256
digest that its `content-digest` header (RFC 9530) announces.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from fedmp.coordinator.guard import Limits
from fedmp.errors import RefusedError
from fedmp.updates import CONTENT_ENCODING

__all__ = ["content_encoding", "read_message", "stream_to_file"]

Message = TypeVar("Message", bound=BaseModel)

_AT_ONCE_BYTES = 256 << 10  # two are held in memory for each upload; fewer bytes cost more to hand over
_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]+):")


async def stream_to_file(request: Request, path: Path, *, max_bytes: int, limits: Limits) -> int:
    """Stream a body to disk.

    Args:
        request: whose body it is; must announce its digest.
        path: where to; the caller removes it after a refusal.
        max_bytes: a longer body is refused, before or while it comes.
        limits: how slow it may be.

    Returns:
        Its length in bytes.

    Raises:
        RefusedError: it is too long, too slow, breaks off, or is not what its digest announces.
    """
    expected = _announced_digest(request)
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > max_bytes:
        raise RefusedError(
            f"the body has {announced[:20]} bytes, at most {max_bytes} are allowed",
            status=413,
            reason="too-long",
        )
    num_bytes = 0
    with _HashedFile(path) as file:
        async with aclosing(_chunks(request, limits)) as chunks:
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise RefusedError(
                        f"the body has more than {max_bytes} bytes", status=413, reason="too-long"
                    )
                await file.write(chunk)
        digest = await file.digest()
    if not hmac.compare_digest(digest, expected):
        raise RefusedError(
            f"the body's {num_bytes} bytes do not have the digest that was announced; send it again",
            status=400,
            reason="tampered",
        )
    return num_bytes


async def read_message(request: Request, kind: type[Message], limits: Limits) -> Message:
    """A small JSON body as a validated message.

    Raises:
        RefusedError: it is too long, too slow, breaks off, or is not valid.
    """
    body = bytearray()
    async with aclosing(_chunks(request, limits)) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > limits.max_message_bytes:
                raise RefusedError(
                    f"a message has at most {limits.max_message_bytes} bytes", status=413, reason="too-long"
                )
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RefusedError(
            f"not a valid {kind.__name__}: {f'{where}: ' if where else ''}{first['msg']}",
            status=422,
            reason="malformed",
        ) from error


def content_encoding(request: Request) -> str:
    """How a body is compressed: "zstd", or "identity" for not at all.

    Raises:
        RefusedError: in any other way.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", CONTENT_ENCODING):
        raise RefusedError(
            f"a body is compressed by {CONTENT_ENCODING} or not at all, not by {encoding[:40]!r}",
            status=415,
            reason="unknown-encoding",
        )
    return encoding


class _HashedFile:
    """A file that another thread hashes and writes while the next piece comes in.

    Args:
        path: of the new file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._under_way: asyncio.Future[None] | None = None

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._under_way is None:
            self._file.close()
        else:  # the request was refused or cancelled, and the other thread may still write
            self._under_way.add_done_callback(self._close)

    async def write(self, piece: bytes) -> None:
        """Take a piece; waits if the file cannot keep up.

        Raises:
            OSError: an earlier one could not be written.
        """
        self._pieces.append(piece)
        self._num_bytes += len(piece)
        if self._num_bytes >= _AT_ONCE_BYTES:
            await self._hand_over()

    async def digest(self) -> bytes:
        """Write the rest; the SHA-256 digest of the whole file.

        Raises:
            OSError: it could not be written.
        """
        await self._hand_over()
        await self._settle()
        return self._hash.digest()

    async def _hand_over(self) -> None:
        await self._settle()
        pieces, self._pieces, self._num_bytes = self._pieces, [], 0
        self._under_way = asyncio.get_running_loop().run_in_executor(None, self._put, pieces)

    async def _settle(self) -> None:
        if self._under_way is not None:
            await asyncio.shield(self._under_way)  # who waits may be cancelled, the thread cannot
            self._under_way = None

    def _put(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self._hash.update(piece)
            rest = memoryview(piece)
            while rest:  # the last bytes of a disk are taken without complaint, and then no more
                rest = rest[self._file.write(rest) :]

    def _close(self, under_way: asyncio.Future[None]) -> None:
        self._file.close()
        if not under_way.cancelled():
            under_way.exception()  # why the request failed has been said already


def _announced_digest(request: Request) -> bytes:
    """The SHA-256 digest that a request announces for its body.

    Raises:
        RefusedError: it announces none, or it is malformed.
    """
    found = _DIGEST.search(request.headers.get("content-digest", ""))
    try:
        digest = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise RefusedError(
            "an update needs a header 'content-digest: sha-256=:BASE64:' of its body",
            status=400,
            reason="no-digest",
        )
    return digest


async def _chunks(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    """The pieces of a body, as long as it gets on."""
    started_s = time.monotonic()
    num_bytes = 0
    with _Watchdog(limits.stall_timeout_s) as watchdog:
        try:
            async for chunk in request.stream():
                num_bytes += len(chunk)
                graced_s = time.monotonic() - started_s - limits.stall_timeout_s
                if num_bytes < graced_s * limits.min_bytes_per_s:
                    raise RefusedError(
                        f"the body comes at less than {limits.min_bytes_per_s:g} bytes a second",
                        status=408,
                        reason="stalled",
                    )
                yield chunk
                watchdog.pat()
        except ClientDisconnect:
            raise RefusedError(
                f"the body broke off after {num_bytes} bytes", status=400, reason="broken-off"
            ) from None
        except asyncio.CancelledError:
            if not watchdog.has_bitten:
                raise
            raise RefusedError(
                f"no byte of the body came for {limits.stall_timeout_s:g} s, after {num_bytes}",
                status=408,
                reason="stalled",
            ) from None


class _Watchdog:
    """Cancels the current task once it has not been patted for so long.

    One timer for a whole body: `asyncio.wait_for` would make a task for each piece, which costs as much as
    reading it.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.has_bitten = False

    def __enter__(self) -> _Watchdog:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self.pat()
        self._timer = self._loop.call_later(self._patience_s, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self.has_bitten and self._task is not None and hasattr(self._task, "uncancel"):
            self._task.uncancel()

    def pat(self) -> None:
        """All is well."""
        self._patted_s = self._loop.time()

    def _look(self) -> None:
        left_s = self._patted_s + self._patience_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        elif self._task is not None:
            self.has_bitten = True
            self._task.cancel()
