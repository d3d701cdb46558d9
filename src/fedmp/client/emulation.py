"""Slower devices and links than this machine's: each action and each transfer lasts as long as it would there.

Nothing is computed otherwise; whoever is too fast sleeps for the rest. A device without an emulation has nothing
of this on its way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedmp.client.federation import HttpFederation
from fedmp.errors import DeadlineError
from fedmp.pipeline import Pace, Pending, Transport
from fedmp.records import DeviceReport
from fedmp.topology import Link

__all__ = ["Emulation", "SlowFederation", "SlowTransport"]

_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Emulation:
    """What a device is like that this process stands for.

    Attributes:
        paces: of its stages, by number.
        uplink: to the coordinator.
        links: to the client's other devices, by rank.
    """

    paces: Mapping[int, Pace]
    uplink: Link
    links: Mapping[int, Link]


class SlowFederation(HttpFederation):
    """Dials the coordinator over a slower line.

    Args:
        url, token: as `HttpFederation` takes them.
        link: the line.
    """

    def __init__(self, url: str, token: str, link: Link) -> None:
        super().__init__(url, token)
        self._link = link

    def pull(self, round: int, **options: Any) -> dict[str, torch.Tensor]:
        """The round's global stages, after as long as they would take."""
        start_s = time.perf_counter()
        pulled = super().pull(round, **options)
        _sleep_until(start_s + self._link.transfer_s(_num_bytes(pulled)))
        return pulled

    def push(
        self, round: int, payload: Mapping[str, torch.Tensor], report: DeviceReport, **options: Any
    ) -> None:
        """Hand in the round's update, which arrives after as long as it would take."""
        _sleep_until(time.perf_counter() + self._link.transfer_s(_num_bytes(payload)))
        super().push(round, payload, report, **options)


class SlowTransport:
    """Messages between the devices of a client over slower links.

    A link carries the bytes of one message at a time in each direction; the latency of one passes while the next is
    sent.

    Args:
        transport: that carries them in the end.
        links: by rank of the peer.
    """

    def __init__(self, transport: Transport, links: Mapping[int, Link]) -> None:
        self._transport = transport
        self._links = links
        self._free_s: dict[int, float] = {}
        self.generation = transport.generation
        self.device = transport.device
        self.is_ordered = transport.is_ordered

    def send(self, buffer: torch.Tensor, peer: int, tag: int) -> Pending:
        """Send a buffer when the link would have carried it."""
        link = self._links[peer]
        start_s = max(time.perf_counter(), self._free_s.get(peer, 0.0))
        self._free_s[peer] = start_s + buffer.numel() * buffer.element_size() / link.bandwidth_bytes_per_s
        message = _Delayed(self._transport, buffer, peer, tag)
        timer = threading.Timer(self._free_s[peer] + link.latency_s - time.perf_counter(), message.send)
        timer.daemon = True
        timer.start()
        return message

    def receive(self, buffer: torch.Tensor, peer: int, tag: int) -> Pending:
        """Receive as ever: what is late is sent late."""
        return self._transport.receive(buffer, peer, tag)


class _Delayed:
    """A message that has not left yet."""

    def __init__(self, transport: Transport, buffer: torch.Tensor, peer: int, tag: int) -> None:
        self._message = (buffer, peer, tag)
        self._transport = transport
        self._has_left = threading.Event()
        self._pending: Pending | None = None
        self._error: Exception | None = None

    def send(self) -> None:
        try:
            self._pending = self._transport.send(*self._message)
        except Exception as error:  # whoever waits shall hear of it
            self._error = error
        self._has_left.set()

    def wait(self) -> None:
        if not self._has_left.wait(_PATIENCE_S):
            raise DeadlineError(f"an emulated link did not send within {_PATIENCE_S:g} s")
        if self._error is not None:
            raise self._error
        assert self._pending is not None
        self._pending.wait()


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _sleep_until(moment_s: float) -> None:
    rest_s = moment_s - time.perf_counter()
    if rest_s > 0:
        time.sleep(rest_s)
