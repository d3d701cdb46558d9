"""Every byte that a coordinator's service receives, and a search for raw samples among them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

WINDOW = 32  # so many neighbouring pixels, or labels, are taken for a piece of a sample
_MIN_DISTINCT = 5  # fewer different values occur by chance: zeros, counters, runs of background
_BASE = 0x9E3779B97F4A7C15 | 1


class RecordingProxy:
    """A TCP relay in front of a service; keeps what flows towards it.

    Args:
        host, port: of the service.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._lock = threading.Lock()
        self._received: list[bytearray] = []
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> RecordingProxy:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(timeout=5)

    def connections(self) -> list[bytes]:
        """What came in on each connection, from its first byte to its last."""
        with self._lock:
            return [bytes(received) for received in self._received]

    def _start(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            record = bytearray()
            with self._lock:
                self._received.append(record)
                self._open += [near, far]
            self._start(self._relay, near, far, record)
            self._start(self._relay, far, near, None)

    def _relay(self, source: socket.socket, target: socket.socket, record: bytearray | None) -> None:
        try:
            while chunk := source.recv(1 << 16):
                if record is not None:
                    with self._lock:
                        record += chunk
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return


def find_pieces(
    haystack: bytes, samples: Iterable[npt.NDArray[np.generic]], *, window: int = WINDOW
) -> list[str]:
    """Where `window` consecutive values of a sample occur byte for byte, at any offset of either.

    Windows of fewer than five different values are left out: they hold no information to leak and
    occur by chance. Each sample is searched for as it is; give several forms of it for several.

    Args:
        haystack: where to search.
        samples: 1-D arrays; values are compared as little-endian bytes of their dtype.
        window: values that count as a piece.

    Returns:
        One line for each piece found, at most ten.
    """
    by_width: dict[int, list[bytes]] = {}
    for sample in samples:
        values = np.ascontiguousarray(sample)
        for start in range(len(values) - window + 1):
            piece = values[start : start + window]
            if len(np.unique(piece)) >= _MIN_DISTINCT:
                by_width.setdefault(piece.nbytes, []).append(piece.tobytes())
    found = []
    for width, pieces in by_width.items():
        wanted = {int(value): piece for piece, value in zip(pieces, _hashes_of(pieces), strict=True)}
        hashes = _rolling_hashes(haystack, width)
        for offset in np.flatnonzero(np.isin(hashes, np.array(list(wanted), dtype=np.uint64))):
            piece = wanted[int(hashes[offset])]
            if haystack[offset : offset + width] == piece:
                found.append(f"{width} bytes of a sample at offset {offset}")
                if len(found) == 10:
                    return found
    return found


def find_labels(haystack: bytes, orders: Sequence[Sequence[int]], *, window: int = 12) -> list[str]:
    """Where `window` consecutive labels occur, as binary numbers of any width or as decimal text."""
    found = []
    for labels in orders:
        array = np.asarray(labels)
        for dtype in ("u1", "i1", "<i2", "<i4", "<i8", "<f4", "<f8"):
            found += find_pieces(haystack, [array.astype(dtype)], window=window)
        for separator in (",", ", ", " "):
            for start in range(len(array) - window + 1):
                piece = array[start : start + window]
                text = separator.join(map(str, piece.tolist()))
                if len(np.unique(piece)) >= _MIN_DISTINCT and text.encode() in haystack:
                    found.append(f"labels {text}")
    return found


def _rolling_hashes(data: bytes, width: int) -> npt.NDArray[np.uint64]:
    """A polynomial hash, modulo 2**64, of every window of `width` bytes."""
    values = np.frombuffer(data, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    if len(values) < width:
        return np.zeros(0, dtype=np.uint64)
    powers = _powers(len(values) + 1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers[:-1], dtype=np.uint64)])
    inverses = _powers(len(values) + 1, pow(_BASE, -1, 1 << 64))
    return (sums[width:] - sums[:-width]) * inverses[: len(values) - width + 1]


def _hashes_of(pieces: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    stacked = np.frombuffer(b"".join(pieces), dtype=np.uint8).reshape(len(pieces), -1)
    values = stacked.astype(np.uint64) + np.uint64(1)
    return (values * _powers(values.shape[1])[None, :]).sum(axis=1, dtype=np.uint64)


def _powers(count: int, base: int = _BASE) -> npt.NDArray[np.uint64]:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
