"""Deadlines of a connection: no peer holds one open without getting on.

uvicorn itself waits for ever for the rest of a request's head, and for a reader that does not read. Bodies
are watched where they are read, in `fedmp.coordinator.border`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Limits", "guarded_protocol"]


@dataclass(frozen=True)
class Limits:
    """What a peer may take.

    Attributes:
        head_timeout_s: to send the whole head of a request, from the connection's or its first byte on.
        stall_timeout_s: between two pieces of a body, in either direction.
        min_bytes_per_s: that an upload must reach on average, once it has lasted `stall_timeout_s`.
        idle_timeout_s: that a connection may rest between two requests.
        max_connections: open at once; more are answered 503.
        max_message_bytes: longest JSON message.
        long_poll_s: that a device which asks what to do is kept waiting for news.
    """

    head_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0
    min_bytes_per_s: float = 1024.0
    idle_timeout_s: float = 30.0
    max_connections: int = 4096
    max_message_bytes: int = 1 << 20
    long_poll_s: float = 10.0


def guarded_protocol(limits: Limits, on_cut: Callable[[str, str], None]) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with deadlines.

    Args:
        limits: the deadlines.
        on_cut: told the reason ("slow-head" or "slow-reader") and the peer of each connection that is cut.
    """

    class Guarded(H11Protocol):
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._deadline)
            self._deadline = None
            _cancel(self._stalled)
            self._stalled = None
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self._stalled or self.loop.call_later(
                limits.stall_timeout_s, self._cut, "slow-reader"
            )

        def resume_writing(self) -> None:
            _cancel(self._stalled)
            self._stalled = None
            super().resume_writing()

        def _expect_head(self) -> None:
            """A request that is being answered has its whole head; else its time runs."""
            if self.cycle is not None and not self.cycle.response_complete:
                _cancel(self._deadline)
                self._deadline = None
            elif self._deadline is None:
                self._deadline = self.loop.call_later(limits.head_timeout_s, self._head_is_late)

        def _head_is_late(self) -> None:
            self._deadline = None
            is_busy = self.cycle is not None and not self.cycle.response_complete
            # between two requests the keep-alive timer runs instead
            if not is_busy and self.timeout_keep_alive_task is None:
                self._cut("slow-head")

        def _cut(self, reason: str) -> None:
            if self.transport.is_closing():
                return
            on_cut(reason, self.client[0] if self.client else "")
            if reason == "slow-head":
                self.transport.write(_REQUEST_TIMEOUT)
                self.transport.close()
            else:
                self.transport.abort()

    return Guarded


_DETAIL = b'{"detail":"the head of the request did not come in time","reason":"slow-head"}'
_REQUEST_TIMEOUT = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_DETAIL), _DETAIL)
)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
