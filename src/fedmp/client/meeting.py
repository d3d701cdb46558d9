"""How a client's devices come together: one generation of the pipeline after another.

The first device opens a rendezvous and tells the coordinator where; the others ask for it. The process group
is only made once all are there, because making it blocks and cannot be called off, while waiting can be: a
device may be lost in the meantime, and its client be told to meet in the next generation instead.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedmp.client.federation import Federation
from fedmp.errors import DeadlineError, FederationError
from fedmp.pipeline import DistributedTransport, Rendezvous, host_rendezvous, join_rendezvous
from fedmp.records import Address

__all__ = ["Meeting", "Place", "meet", "stages_text"]

_ANNOUNCE_S = 1.0
_CHECK_S = 0.25
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.001, 0.02
# once all are there, the rest takes milliseconds, unless one is lost in these very milliseconds
_CONNECT_S = 15.0


@dataclass(frozen=True)
class Place:
    """Where and with whom a device meets.

    Attributes:
        client, device: names.
        rank: of the device.
        placement: the stages of each device.
        host: address at which the devices reach each other.
        backend, torch_device: of the transport.
        timeout_s: deadline of the meeting, and of one transfer.
    """

    client: str
    device: str
    rank: int
    placement: tuple[tuple[int, ...], ...]
    host: str
    backend: str
    torch_device: str
    timeout_s: float


@dataclass(frozen=True)
class Meeting:
    """A generation that is up.

    Attributes:
        address: where it came together.
        transport: between its devices.
    """

    address: Address
    transport: DistributedTransport


def meet(place: Place, federation: Federation, generation: int, *, check: Callable[[int], None]) -> Meeting:
    """Come together with the client's other devices.

    Args:
        place: where and with whom.
        federation: tells the others where.
        generation: its number; devices that are told later may name a newer one, which then counts.
        check: called now and then with the number of the generation; raises if it is over.

    Raises:
        DeadlineError: not all devices came.
        PipelineError: one was lost on the way, or the generation is over.
    """
    if place.host in ("127.0.0.1", "::1", "localhost"):
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        if loopback is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if place.rank == 0:
        rendezvous = host_rendezvous(place.host, timeout_s=place.timeout_s)
        address = Address(
            host=place.host, port=rendezvous.port, secret=os.urandom(16).hex(), number=generation
        )
        federation.publish_address(address)
        announced: contextlib.AbstractContextManager[None] = _announced(federation, address)
    else:
        announced = contextlib.nullcontext()
        address = _find_address(place, federation, generation, check)
        rendezvous = join_rendezvous(address.host, address.port, timeout_s=place.timeout_s)
    prefix = f"fedmp/{place.client}/{address.secret}"
    with announced:
        _wait_for_all(place, rendezvous, prefix, address.number, check)
        transport = DistributedTransport(
            rendezvous,
            rank=place.rank,
            world_size=len(place.placement),
            prefix=prefix,
            generation=address.number,
            device=place.torch_device,
            backend=place.backend,
            timeout_s=place.timeout_s,
            connect_timeout_s=min(_CONNECT_S, place.timeout_s),
            names=[stages_text(own) for own in place.placement],
        )
    return Meeting(address, transport)


def stages_text(stages: Sequence[int]) -> str:
    """What messages call a device with these stages."""
    return f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"


def _find_address(
    place: Place, federation: Federation, generation: int, check: Callable[[int], None]
) -> Address:
    deadline_s = time.monotonic() + place.timeout_s
    while time.monotonic() < deadline_s:
        address = federation.address(generation, wait_s=_CHECK_S)
        if address is not None and address.number >= generation:
            return address
        check(generation)
    raise DeadlineError(f"the client's first device did not come up within {place.timeout_s:g} s")


def _wait_for_all(
    place: Place, rendezvous: Rendezvous, prefix: str, generation: int, check: Callable[[int], None]
) -> None:
    rendezvous.arrive(prefix, place.rank)
    world_size = len(place.placement)
    started_s = checked_s = time.monotonic()
    pause_s = _FIRST_LOOK_S
    while missing := rendezvous.missing(prefix, world_size):
        now_s = time.monotonic()
        if now_s - started_s > place.timeout_s:
            names = ", ".join(stages_text(place.placement[rank]) for rank in missing)
            raise DeadlineError(
                f"generation {generation} of the pipeline did not come together within "
                f"{place.timeout_s:g} s: {names} did not come"
            )
        if now_s - checked_s > _CHECK_S:
            check(generation)
            checked_s = time.monotonic()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_LOOK_S)


@contextlib.contextmanager
def _announced(federation: Federation, address: Address) -> Iterator[None]:
    """Say it again now and then: a coordinator that is started anew has forgotten it, and the others wait."""
    is_done = threading.Event()

    def announce() -> None:
        while not is_done.wait(_ANNOUNCE_S):
            with contextlib.suppress(FederationError):
                federation.publish_address(address)

    thread = threading.Thread(target=announce, name="fedmp-announce", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
