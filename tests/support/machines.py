"""Machines of their own on this one: network namespaces, joined by a network that a test can slow, thin and cut.

Each machine is a namespace with one TUN interface; what it sends is real IP, read here, held back as long as the
test wants, and written to the interface of the machine it is for. Nothing reaches any other network, and the
kernel needs nothing but namespaces and TUN (traffic control's netem is missing from many).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import selectors
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_NETWORK = "10.213.77"


class Machines:
    """Machines and the network between them; use it as a context manager.

    Args:
        names: of the machines.

    Attributes:
        delay_s: of every packet, one way.
        loss: share of the packets that are lost.
    """

    def __init__(self, names: Sequence[str]) -> None:
        _skip_where_impossible()
        self.delay_s = 0.0
        self.loss = 0.0
        self._names = list(names)
        self._apart: frozenset[frozenset[str]] = frozenset()
        self._chance = random.Random(1)
        self._wake, self._woken = os.pipe()
        self._tunnels: dict[str, int] = {}
        self._made: list[str] = []
        self._thread = threading.Thread(target=self._carry, name="test network", daemon=True)

    def __enter__(self) -> Machines:
        try:
            for name in self._names:
                self._make(name)
        except BaseException:
            self._remove()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._woken, b"!")
        self._thread.join()
        self._remove()

    def address(self, name: str) -> str:
        """Of a machine."""
        return f"{_NETWORK}.{self._names.index(name) + 1}"

    def namespace(self, name: str) -> str:
        """What `ip netns` calls a machine."""
        return f"fedmp-test-{os.getpid()}-{name}"

    @contextlib.contextmanager
    def apart(self, first: str, second: str) -> Iterator[None]:
        """No packet passes between two machines while this is open."""
        self._apart |= {frozenset((first, second))}
        try:
            yield
        finally:
            self._apart -= {frozenset((first, second))}

    def _make(self, name: str) -> None:
        space, link = self.namespace(name), f"ft{os.getpid() % 100000}x{len(self._made)}"
        _ip("netns", "add", space)
        self._made.append(space)
        tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._tunnels[name] = tunnel
        fcntl.ioctl(tunnel, _TUNSETIFF, struct.pack("16sH22x", link.encode(), _IFF_TUN | _IFF_NO_PI))
        _ip("link", "set", link, "netns", space)
        _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", link)
        for device in ("lo", link):
            _ip("-n", space, "link", "set", device, "up")

    def _remove(self) -> None:
        for descriptor in (*self._tunnels.values(), self._wake, self._woken):
            os.close(descriptor)
        for space in self._made:
            _ip("netns", "delete", space)

    def _carry(self) -> None:
        """The network: until it is woken up to end."""
        homes = {self.address(name): name for name in self._names}
        under_way: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            for name, tunnel in self._tunnels.items():
                selector.register(tunnel, selectors.EVENT_READ, name)
            while True:
                wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
                for key, _ in selector.select(wait_s):
                    if key.data is None:
                        return
                    packet = os.read(key.fd, 1 << 16)
                    home = homes.get(".".join(map(str, packet[16:20]))) if packet[0] >> 4 == 4 else None
                    if home is None or frozenset((key.data, home)) in self._apart:
                        continue
                    if self._chance.random() >= self.loss:
                        due_s = time.monotonic() + self.delay_s
                        heapq.heappush(under_way, (due_s, next(order), self._tunnels[home], packet))
                while under_way and under_way[0][0] <= time.monotonic():
                    _, _, tunnel, packet = heapq.heappop(under_way)
                    with contextlib.suppress(BlockingIOError):  # a full queue loses packets, as a router does
                        os.write(tunnel, packet)


def enter(namespace: str) -> None:
    """Let this process live on a machine from now on; to be called while it has one thread.

    Raises:
        OSError: it cannot.
    """
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    finally:
        os.close(descriptor)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _skip_where_impossible() -> None:
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (iproute2) to make network namespaces")
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    if not Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun to join network namespaces")
    probe = f"fedmp-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    _ip("netns", "delete", probe)
