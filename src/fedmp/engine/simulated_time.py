"""The clock of a simulated job: who finishes a round when, what happened by then, and which devices are left."""

from __future__ import annotations

import math
import operator
from collections.abc import Container
from typing import NamedTuple

from fedmp.clock import Always, ClientTiming, ClientWork, ideal_round_s, time_clients
from fedmp.coordinator import Opening
from fedmp.engine.arrivals import Arrivals
from fedmp.engine.client_plan import plan_anew
from fedmp.engine.population import MANY_CLIENTS, SomeClients
from fedmp.engine.session import Session
from fedmp.engine.setup import ClientSetup
from fedmp.errors import PlanError
from fedmp.records import ClockEvent, RoundTimed

__all__ = ["SimulatedTime"]

_GONE = "no plan fits the devices that it has left"


class SimulatedTime:
    """Keeps simulated time for the clients of a job.

    Args:
        session: the job under way; told of what happened in each round.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._job = session.prepared.job
        self._now_s = session.simulated_s
        self._clients = session.prepared.clients
        self._is_logged = self._job.clock.is_logged(len(self._clients))
        self._changed: dict[str, ClientSetup | None] = {}  # by the loss of devices
        # nothing but plans and links decides, and no one wants to know of the moments between
        is_ideal = self._job.clock.is_ideal
        self._is_ideal = is_ideal and not self._is_logged
        self._repeats = is_ideal and len(self._clients) <= MANY_CLIENTS
        self._known_s: dict[tuple[int, int], float] = {}
        self._timings: dict[str, ClientTiming] = {}
        self._repeated: dict[tuple[str, int, int], ClientTiming] = {}
        self._steady: dict[str, ClientTiming] = {}  # of clients that do the same in each round
        self._closed = _Closed((), math.nan, (), 0, 0)
        self._round = session.first_round - 1
        self._losing = {loss.device.partition("/")[0] for loss in self._job.clock.losses}
        for client in self._losing:
            self._changed[client] = self._left(client, range(1, session.first_round))

    def open(self, opening: Opening) -> None:
        """A round opens: its cohort begins."""
        self._round = opening.round
        self._timings = {}
        if self._is_ideal:  # each client's time is known by its plan, when it is asked for
            return
        new = [client for client in opening.cohort if client not in self._steady]
        works = [work for client in new if (work := self._work(client)) is not None]
        timed = {timing.client: timing for timing in self._time(works)}
        if self._repeats:
            self._steady.update((name, own) for name, own in timed.items() if self._is_steady(name))
        for client in opening.cohort:
            timing = self._steady.get(client) or timed.get(client)
            if timing is not None:
                self._timings[client] = timing
        for client in self._losing:
            self._changed[client] = self._left(client, range(1, opening.round + 1))

    def finish_s(self, cohort: SomeClients, round: int) -> list[float]:
        """Seconds in which each of some clients finishes that begin now; infinite if it never does."""
        if self._is_ideal:
            amounts = cohort.amounts(round)
            return [
                self._ideal_s(kind, amount.batches)
                for kind, amount in zip(cohort.kinds, amounts, strict=True)
            ]
        return [self._finish_s(client) for client in cohort.names]

    def _finish_s(self, client: str) -> float:
        if client not in self._timings:
            work = self._work(client)
            if work is None:
                return math.inf
            (self._timings[client],) = self._time([work])
        return self._timings[client].arrival_s

    def away(self) -> frozenset[str]:
        """Clients that cannot work just now."""
        availability, seed = self._job.clock.availability, self._job.seed
        if isinstance(availability, Always):
            return frozenset()
        windows = {c: availability.window(c, self._now_s, seed=seed) for c in self._clients}
        return frozenset(c for c, w in windows.items() if w is None or w.start_s > self._now_s)

    def reason(self, client: str) -> str:
        """Why a client's update does not count: what became of it, or that it is late."""
        timing = self._timings.get(client)
        if timing is None:
            return _GONE if self._setup(client) is None else "late"
        return timing.reason or "late"

    def close(self, arrivals: Arrivals) -> tuple[int, int]:
        """The round closes; returns the devices and clients that were lost, and the attempts after the first."""
        closed = self._close(arrivals)
        if self._is_logged:
            self._session.observe(RoundTimed(self._round, self._now_s, closed.events))
        self._now_s += arrivals.duration_s
        return closed.num_lost, closed.num_retries

    def _close(self, arrivals: Arrivals) -> _Closed:
        timings = tuple(self._timings.values())
        if not arrivals.left_s and self._closed.is_of(timings, arrivals.duration_s):
            return self._closed  # as the round before, in which the same happened
        events = [
            event._replace(what="late")
            if event.what == "arrived" and event.client in arrivals.left_s
            else event
            for timing in timings
            for event in timing.events
        ]
        num_lost = sum(event.what == "lost" for event in events)
        num_retries = sum(max(timing.attempts - 1, 0) for timing in timings)
        events.append(ClockEvent(arrivals.duration_s, "", "", "closed"))
        events.sort(key=lambda event: event.time_s)
        closed = _Closed(timings, arrivals.duration_s, tuple(events), num_lost, num_retries)
        if not arrivals.left_s:
            self._closed = closed
        return closed

    def _ideal_s(self, kind: ClientSetup, num_batches: int) -> float:
        """Seconds of a client's round; of clients of one kind that do as much found out once."""
        key = id(kind), num_batches  # kinds live as long as the job
        if key not in self._known_s:
            self._known_s[key] = ideal_round_s(kind.clock_work(num_batches))
        return self._known_s[key]

    def _setup(self, client: str) -> ClientSetup | None:
        """A client as its losses have left it; None if it cannot train any more."""
        return self._changed[client] if client in self._changed else self._clients[client]

    def _is_steady(self, client: str) -> bool:
        """Whether a client does the same in each round."""
        setup = self._setup(client)
        return setup is not None and setup.work.effort is None and client not in self._losing

    def _time(self, works: list[ClientWork]) -> list[ClientTiming]:
        """How the works go; where nothing but plans and links decides, as they went before."""
        known = self._repeated if self._repeats else {}
        new = [work for work in works if _kind(work) not in known]
        timings = time_clients(
            new, self._job.clock, round=self._round, seed=self._job.seed, start_s=self._now_s
        )
        known.update((_kind(work), timing) for work, timing in zip(new, timings, strict=True))
        return [known[_kind(work)] for work in works]

    def _work(self, client: str) -> ClientWork | None:
        """What a client does in this round, in which it may lose a device; None if it cannot take part."""
        setup = self._setup(client)
        if setup is None:
            return None
        work = _work_of(setup, self._round)
        if client not in self._losing:
            return work
        lost = self._lost(client, [self._round])
        in_use = [device for device in work.plan.devices if device in lost]
        if not in_use:
            return work
        left = self._left(client, range(1, self._round + 1))
        then = None if left is None else _work_of(left, self._round)
        return ClientWork(
            work.client, work.uplink, work.plan, work.num_batches, work.devices, loses=in_use[0], then=then
        )

    def _lost(self, client: str, rounds: Container[int]) -> set[str]:
        """Names of the devices that a client loses in these rounds."""
        own = [loss for loss in self._job.clock.losses if loss.device.startswith(f"{client}/")]
        return {loss.device.partition("/")[2] for loss in own if loss.round in rounds}

    def _left(self, client: str, rounds: Container[int]) -> ClientSetup | None:
        """A client after these rounds' losses; None if it cannot train any more."""
        setup = self._session.prepared.clients[client]
        lost = self._lost(client, rounds)
        devices = [device for device in setup.client.devices if device.name not in lost]
        if len(devices) == len(setup.client.devices):
            return setup
        try:
            return plan_anew(self._session.prepared, setup, devices) if devices else None
        except PlanError:
            return None


class _Closed(NamedTuple):
    """What happened in a round, of which a later one may be a repetition.

    Attributes:
        timings, duration_s: of the round.
        events: in the order of time.
        num_lost: devices and clients that were lost.
        num_retries: attempts after each client's first.
    """

    timings: tuple[ClientTiming, ...]
    duration_s: float
    events: tuple[ClockEvent, ...]
    num_lost: int
    num_retries: int

    def is_of(self, timings: tuple[ClientTiming, ...], duration_s: float) -> bool:
        """Whether the same clients did the very same."""
        is_same = len(timings) == len(self.timings) and duration_s == self.duration_s
        return is_same and all(map(operator.is_, timings, self.timings))


def _kind(work: ClientWork) -> tuple[str, int, int]:
    return work.client, id(work.plan), work.num_batches  # plans live as long as the job


def _work_of(setup: ClientSetup, round: int) -> ClientWork:
    return setup.round_work(setup.num_samples, round=round)
