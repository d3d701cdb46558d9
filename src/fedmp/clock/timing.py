"""When each client's update arrives: pull, train by the plan, push, over links that may be shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedmp.clock.conditions import Clock, Draw
from fedmp.clock.sharing import SharedLink
from fedmp.clock.steps import slowed_step_s
from fedmp.records import ClockEvent, Plan
from fedmp.topology import Link

__all__ = ["ClientTiming", "ClientWork", "DeviceWork", "ideal_round_s", "time_clients"]


@dataclass(frozen=True)
class DeviceWork:
    """What a device moves in a round.

    Attributes:
        device: its name.
        down_bytes: of its global stages.
        up_bytes: of its update, as it travels.
    """

    device: str
    down_bytes: float
    up_bytes: float


@dataclass(frozen=True)
class ClientWork:
    """What a client does in a round.

    Attributes:
        client: its name.
        uplink: between each of its devices and the coordinator.
        plan: which tells how long a step takes.
        num_batches: steps through the pipeline.
        devices: in order of rank.
        loses: the device that it loses for good while it trains; empty for none.
        then: what it does instead, without that device; None if it cannot go on.
    """

    client: str
    uplink: Link
    plan: Plan
    num_batches: int
    devices: tuple[DeviceWork, ...]
    loses: str = ""
    then: ClientWork | None = None


@dataclass(frozen=True)
class ClientTiming:
    """A client's round.

    Attributes:
        client: its name.
        arrival_s: seconds since the round began at which its update is complete; infinite if it never is.
        over_s: when that is so, or is known never to be.
        reason: why it never is; empty if it is.
        attempts: how many it began.
        events: in no particular order.
    """

    client: str
    arrival_s: float
    over_s: float
    reason: str
    attempts: int
    events: tuple[ClockEvent, ...]


def time_clients(
    works: Sequence[ClientWork], clock: Clock, *, round: int, seed: int, start_s: float = 0.0
) -> list[ClientTiming]:
    """Let clients that begin a round together do their work in simulated time.

    Each device pulls its stages beside the others; the pipeline trains when all of the client's have theirs; each
    device pushes its update when training is over; the last one completes the client's update.

    Args:
        works: what they do.
        clock: under which conditions.
        round, seed: of what chance decides.
        start_s: simulated seconds of the run before, for availability.

    Returns:
        One a client, in their order.
    """
    down: SharedLink[tuple[int, int]] = SharedLink(clock.server_bandwidth_bytes_per_s)
    up: SharedLink[tuple[int, int]] = SharedLink(clock.server_bandwidth_bytes_per_s)
    clients = [
        _Client(
            work, clock, clock.draw(work.client, len(work.devices), round=round, seed=seed), seed, start_s
        )
        for work in works
    ]
    for number, client in enumerate(clients):
        client.begin(0.0, number, down)

    def pulled(key: tuple[int, int], time_s: float) -> None:
        clients[key[0]].pulled(key, time_s, down, up)

    def pushed(key: tuple[int, int], time_s: float) -> None:
        clients[key[0]].pushed(key[1], time_s)

    # one direction after the other: pulls never wait for pushes
    down.run(pulled)
    up.run(pushed)
    return [client.timing() for client in clients]


def ideal_round_s(work: ClientWork) -> float:
    """Seconds of a client's round under a `Clock` with nothing set: what `time_clients` then says, at less cost."""
    transfer_s = work.uplink.transfer_s
    pulled_s = max(transfer_s(device.down_bytes) for device in work.devices)
    trained_s = pulled_s + work.num_batches * work.plan.step_s
    return max(trained_s + transfer_s(device.up_bytes) for device in work.devices)


@dataclass
class _Client:
    """A client on its way through the round."""

    work: ClientWork
    clock: Clock
    draw: Draw
    seed: int
    start_s: float
    attempt: int = 0
    missing: int = 0
    leaves_s: float = math.inf
    arrival_s: float = math.inf
    over_s: float = 0.0
    reason: str = ""
    events: list[ClockEvent] = field(default_factory=list)

    def begin(self, time_s: float, number: int, down: SharedLink[tuple[int, int]]) -> None:
        """Begin an attempt, or come back for it later."""
        window = self.clock.availability.window(self.work.client, self.start_s + time_s, seed=self.seed)
        if window is None:
            self._fail(time_s, "away", "not available any more")
            return
        time_s = max(time_s, window.start_s - self.start_s)
        self.leaves_s = window.stop_s - self.start_s
        self.attempt += 1
        self.missing = len(self.work.devices)
        self._note(time_s, "", "begins")
        for rank, device in enumerate(self.work.devices):
            down.add((number, rank), time_s, device.down_bytes, self._link)

    def pulled(
        self,
        key: tuple[int, int],
        time_s: float,
        down: SharedLink[tuple[int, int]],
        up: SharedLink[tuple[int, int]],
    ) -> None:
        """A device has its stages; the last one to get them lets training begin."""
        number, rank = key
        self._note(time_s, self.work.devices[rank].device, "pulled")
        self.missing -= 1
        if self.missing:
            return
        slowness = self.draw.slowness[: len(self.work.devices)]
        train_s = self.work.num_batches * slowed_step_s(self.work.plan, slowness)
        trained_s = time_s + train_s
        if self.work.loses:
            self._lose(time_s + self.draw.when[self.attempt - 1] * train_s, number, down)
            return
        # without others on the link, of whom nothing is known yet
        least_s = trained_s + max(self._link.transfer_s(device.up_bytes) for device in self.work.devices)
        lost_s, what = math.inf, "lost"
        if self.draw.is_lost[self.attempt - 1]:
            lost_s = time_s + self.draw.when[self.attempt - 1] * train_s
        if self.leaves_s < min(lost_s, least_s):
            lost_s, what = self.leaves_s, "left"
        if math.isinf(lost_s):
            self._note(trained_s, "", "trained")
            self.missing = len(self.work.devices)
            for sender, device in enumerate(self.work.devices):
                up.add((number, sender), trained_s, device.up_bytes, self._link)
            return
        may_retry = self.clock.restart_s is not None and self.attempt < self.clock.attempts
        self._fail(max(lost_s, time_s), what, "dropped out" if what == "lost" else "left before it was done")
        if may_retry:
            self.reason = ""
            self.begin(max(lost_s, time_s) + (self.clock.restart_s or 0.0), number, down)

    def _lose(self, time_s: float, number: int, down: SharedLink[tuple[int, int]]) -> None:
        """A device is gone for good; the others begin anew, if they can."""
        self._note(time_s, self.work.loses, "lost")
        if self.work.then is None:
            self.over_s, self.reason = time_s, f"lost {self.work.loses}, and no plan fits the others"
            return
        self.work = self.work.then
        self.begin(time_s + self.clock.notice_s, number, down)

    def pushed(self, rank: int, time_s: float) -> None:
        """A device's update is at the coordinator; the last one completes the client's."""
        self._note(time_s, self.work.devices[rank].device, "pushed")
        self.missing -= 1
        if not self.missing:
            self.arrival_s = self.over_s = time_s
            self._note(time_s, "", "arrived")

    def timing(self) -> ClientTiming:
        """How it went."""
        return ClientTiming(
            self.work.client, self.arrival_s, self.over_s, self.reason, self.attempt, tuple(self.events)
        )

    @property
    def _link(self) -> Link:
        factor = self.draw.link_slowness
        if factor == 1.0:
            return self.work.uplink
        return Link(
            bandwidth_bytes_per_s=self.work.uplink.bandwidth_bytes_per_s / factor,
            latency_s=self.work.uplink.latency_s * factor,
        )

    def _fail(self, time_s: float, what: str, reason: str) -> None:
        self._note(time_s, "", what)
        self.over_s, self.reason = time_s, reason

    def _note(self, time_s: float, device: str, what: str) -> None:
        self.events.append(ClockEvent(time_s, self.work.client, device, what))
