"""Bodies on their way to disk: hashed and written while more comes in, and never half."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from fedmp.coordinator import border
from fedmp.coordinator.border import _HashedFile


async def written(path: Path, pieces: list[bytes]) -> bytes:
    with _HashedFile(path) as file:
        for piece in pieces:
            await file.write(piece)
        return await file.digest()


@pytest.mark.parametrize("sizes", [[], [1], [5] * 40, [1 << 20, 3, (1 << 19) - 1, 1 << 19]])
def test_a_file_has_its_pieces_in_order_and_their_digest(sizes: list[int], tmp_path: Path) -> None:
    pieces = [os.urandom(size) for size in sizes]
    digest = asyncio.run(written(tmp_path / "file", pieces))
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert digest == hashlib.sha256(b"".join(pieces)).digest()


class Grudging:
    """A file that takes a few bytes at a time, and then none."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: memoryview) -> int:
        part = data[: min(100, self._room)]
        if not part:
            raise OSError(28, "No space left on device")
        self._room -= len(part)
        return int(self._file.write(part))

    def close(self) -> None:
        self._file.close()


def test_a_file_is_whole_or_an_error_even_if_the_system_takes_less_than_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write(room: int) -> bytes:
        with _HashedFile(tmp_path / "file") as file:
            file._file = Grudging(file._file, room)  # type: ignore[assignment]
            await file.write(bytes(1000))
            return await file.digest()

    assert asyncio.run(write(1000)) == hashlib.sha256(bytes(1000)).digest()
    assert (tmp_path / "file").stat().st_size == 1000
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(write(999))


def test_a_cancelled_upload_closes_its_file_only_after_the_last_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, order = threading.Event(), list[str]()
    put, close = _HashedFile._put, _HashedFile._close

    def slow_put(self: _HashedFile, pieces: list[bytes]) -> None:
        may_write.wait(10)
        put(self, pieces)
        order.append("written")

    def noted_close(self: _HashedFile, under_way: asyncio.Future[None]) -> None:
        close(self, under_way)
        order.append("closed")

    monkeypatch.setattr(_HashedFile, "_put", slow_put)
    monkeypatch.setattr(_HashedFile, "_close", noted_close)
    monkeypatch.setattr(border, "_AT_ONCE_BYTES", 1)

    async def cancel() -> None:
        upload = asyncio.ensure_future(written(tmp_path / "file", [b"first", b"second"]))
        await asyncio.sleep(0.05)
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        assert order == []
        may_write.set()
        while order != ["written", "closed"]:
            await asyncio.sleep(0.01)

    asyncio.run(cancel())
