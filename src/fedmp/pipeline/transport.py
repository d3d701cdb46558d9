"""The pipeline plane: point-to-point messages between the devices of one client.

The only module that imports `torch.distributed`. Each client is a process group of its own; its members
are numbered by generation, so that survivors of a loss can come up again beside the ruins. Every wait
has a deadline, because a peer that hangs would otherwise block for ever.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist

from fedmp.errors import DeadlineError, PipelineError

__all__ = [
    "DistributedTransport",
    "Pending",
    "Rendezvous",
    "Transport",
    "host_rendezvous",
    "join_rendezvous",
]


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Block until the transfer is done.

        Raises:
            DeadlineError: it was not done in time.
            PipelineError: the peer is gone.
        """
        ...


class Transport(Protocol):
    """Messages between the devices of one client.

    Attributes:
        generation: of the group.
        device: where buffers live.
        is_ordered: whether messages from one peer are told apart by their order alone, not by their tags:
            receives must then be posted in the order in which the peer sends.
    """

    generation: int
    device: torch.device
    is_ordered: bool

    def send(self, buffer: torch.Tensor, peer: int, tag: int) -> Pending:
        """Start to send a buffer; it must not change until the transfer is done."""
        ...

    def receive(self, buffer: torch.Tensor, peer: int, tag: int) -> Pending:
        """Start to receive into a buffer of exactly the size that is sent."""
        ...


class Rendezvous:
    """Where the devices of a client find each other: a store that the first device hosts.

    Args:
        store: the connected store.
        port: on which the host listens.
    """

    def __init__(self, store: Any, port: int) -> None:
        self.store = store
        self.port = port

    def arrive(self, prefix: str, rank: int) -> None:
        """Say that this device is there.

        Raises:
            PipelineError: the first device is gone.
        """
        try:
            self.store.set(f"{prefix}/arrived/{rank}", "")
        except RuntimeError as error:
            raise PipelineError(f"lost the client's first device: {_first_line(error)}") from error

    def missing(self, prefix: str, world_size: int) -> list[int]:
        """Ranks that are not there yet.

        Raises:
            PipelineError: the first device is gone.
        """
        try:
            return [rank for rank in range(world_size) if not self.store.check([f"{prefix}/arrived/{rank}"])]
        except RuntimeError as error:
            raise PipelineError(f"lost the client's first device: {_first_line(error)}") from error


def host_rendezvous(host: str, port: int = 0, *, timeout_s: float = 60.0) -> Rendezvous:
    """Open the store that the other devices will connect to.

    Args:
        host: address to listen on, on the client's own network.
        port: 0 picks a free one.
        timeout_s: longest wait for a key.

    Raises:
        PipelineError: the address cannot be used.
    """
    try:
        # the store by itself would listen on every interface of the machine
        listener = socket.create_server((host, port), family=_family(host), backlog=256)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
    except (OSError, RuntimeError) as error:
        raise PipelineError(f"cannot listen for the client's devices on {host}:{port}: {error}") from error
    return Rendezvous(store, store.port)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def join_rendezvous(host: str, port: int, *, timeout_s: float = 60.0) -> Rendezvous:
    """Connect to the store of the client's first device.

    Raises:
        PipelineError: it does not answer.
    """
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=False, timeout=timedelta(seconds=timeout_s)
        )
    except RuntimeError as error:
        raise PipelineError(f"the client's first device does not answer on {host}:{port}: {error}") from error
    return Rendezvous(store, port)


class DistributedTransport:
    """A process group of `torch.distributed`, one process a device.

    Args:
        rendezvous: the client's store.
        rank: this device's number.
        world_size: the client's devices.
        prefix: of this group's keys in the store; holds the generation's secret.
        generation: counted up each time the group is brought up.
        device: where the buffers live.
        backend: "gloo" or "nccl".
        timeout_s: deadline of one transfer.
        connect_timeout_s: deadline of bringing the group up; None for the same.
        names: what messages call each rank; None for "stage RANK".
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        *,
        rank: int,
        world_size: int,
        prefix: str,
        generation: int = 0,
        device: torch.device | str = "cpu",
        backend: str = "gloo",
        timeout_s: float = 60.0,
        connect_timeout_s: float | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.generation = generation
        self._names = names or [f"stage {peer}" for peer in range(world_size)]
        self.device = torch.device(device)
        self.is_ordered = backend == "nccl"
        self._timeout = timedelta(seconds=timeout_s)
        connect_s = timeout_s if connect_timeout_s is None else connect_timeout_s
        self._under_way: WeakSet[_Transfer] = WeakSet()
        if self.is_ordered:
            # a wait must block and end at its deadline, as gloo's do, and not kill the process
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            torch.cuda.set_device(self.device)
        try:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(  # type: ignore[attr-defined]
                    f"{prefix}/{generation}", rendezvous.store
                ),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=connect_s),
            )
        except dist.DistStoreError as error:
            _forget_attempt()
            raise DeadlineError(
                f"generation {generation} of the pipeline did not come together within {connect_s:g} s: "
                f"{_first_line(error)}"
            ) from error
        except RuntimeError as error:
            _forget_attempt()
            raise PipelineError(
                f"generation {generation} of the pipeline did not come up: {_first_line(error)}"
            ) from error
        group = dist.group.WORLD
        assert group is not None
        self._group: dist.ProcessGroup | None = group
        # nccl runs the transfers of two ranks in one group one after another, so that a receive that was
        # posted ahead would hold up the send behind it, which the peer may be waiting for: each direction
        # has a group of its own
        down = dist.new_group(backend=backend, timeout=self._timeout) if self.is_ordered else group
        self._groups_to = [group if peer > rank else down for peer in range(world_size)]
        self._groups_from = [down if peer > rank else group for peer in range(world_size)]
        if self.is_ordered:
            self._meet_peers(rank, world_size)

    def send(self, buffer: torch.Tensor, peer: int, tag: int) -> Pending:
        """Start to send a buffer to a device.

        Raises:
            PipelineError: the device is gone, or the group was left.
        """
        # the group's own method: `dist.isend` only adds checks, which cost as much as a small message
        self._check_open()
        try:
            return self._started(self._groups_to[peer].send([buffer], peer, tag), peer, "send to")
        except RuntimeError as error:
            raise PipelineError(f"cannot send to {self._names[peer]}: {_first_line(error)}") from error

    def receive(self, buffer: torch.Tensor, peer: int, tag: int) -> Pending:
        """Start to receive a buffer from a device.

        Raises:
            PipelineError: the device is gone, or the group was left.
        """
        self._check_open()
        try:
            return self._started(self._groups_from[peer].recv([buffer], peer, tag), peer, "receive from")
        except RuntimeError as error:
            raise PipelineError(f"cannot receive from {self._names[peer]}: {_first_line(error)}") from error

    def close(self) -> None:
        """Leave the group, whatever is under way. The devices that remain notice at their next wait."""
        # a transfer that is still held would keep its connection open, and the peer waiting
        for transfer in list(self._under_way):
            transfer.abandon()
        self._under_way.clear()
        if self._group is not None:
            self._group = None
            self._groups_to = self._groups_from = []
            dist.destroy_process_group()

    def _check_open(self) -> None:
        if self._group is None:
            raise PipelineError("this transport is closed")

    def _meet_peers(self, rank: int, world_size: int) -> None:
        """Set up nccl's communicators, each of which blocks both of its ends, pair by pair in one order.

        Made when first needed they could wait for each other in a circle.
        """
        byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
        for first, second in itertools.combinations(range(world_size), 2):
            if rank == first:
                self.send(byte, second, 0).wait()
                self.receive(byte, second, 0).wait()
            elif rank == second:
                self.receive(byte, first, 0).wait()
                self.send(byte, first, 0).wait()

    def _started(self, work: dist.Work, peer: int, verb: str) -> Pending:
        transfer = _Transfer(work, self._names[peer], verb, self._timeout)
        self._under_way.add(transfer)
        return transfer


class _Transfer:
    __slots__ = ("__weakref__", "_peer", "_timeout", "_verb", "_work")

    def __init__(self, work: dist.Work, peer: str, verb: str, timeout: timedelta) -> None:
        self._work: dist.Work | None = work
        self._peer = peer
        self._verb = verb
        self._timeout = timeout

    def wait(self) -> None:
        if self._work is None:
            raise PipelineError("this transport is closed")
        try:
            self._work.wait(self._timeout)
        except RuntimeError as error:
            reason = _first_line(error)
            if "timed out" in reason.lower() or "timeout" in reason.lower():
                raise DeadlineError(
                    f"{self._peer} was silent for {self._timeout.total_seconds():g} s "
                    f"({self._verb} it did not finish)"
                ) from error
            raise PipelineError(f"lost {self._peer}: {reason}") from error

    def abandon(self) -> None:
        """Let go of the connection."""
        self._work = None


def _forget_attempt() -> None:
    """Let torch count the groups of this process from zero again, as its peers do.

    The count is part of the name under which a group meets. A group that did not come up is counted, and only
    leaving one that did resets it, so that a device that failed once would never meet the others again.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    """What a library says, without the place in its source and its advice."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    line = re.sub(r"^\[\S+:\d+\] ", "", text.splitlines()[0])
    return line.partition(". This is typically")[0]
