"""The notice board between the round loop and the devices' requests.

The round loop runs in one thread, the HTTP service in another. The board is all that they share: which
round is open for whom, which updates are in, who failed. Waiting on it is always bounded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from fedmp.coordinator.attempts import Attempts
from fedmp.coordinator.joining import Joining
from fedmp.coordinator.members import BoardStatus, Member
from fedmp.coordinator.roll import Roll
from fedmp.errors import (
    DataError,
    DeadlineError,
    FedmpError,
    FrameError,
    PipelineError,
    RefusedError,
    RoundError,
    TrainingError,
)
from fedmp.records import Address, FailureReport, Instruction, ProgressReport, Ready

__all__ = ["Board"]

# a device that lost a peer says so at once; what happened to the peer is known a moment later
_CAUSE_S = 2.0

# what would go wrong again on any machine
_OF_ALL = ("DataError", "TrainingError")

_KINDS: dict[str, type[FedmpError]] = {
    kind.__name__: kind for kind in (DataError, DeadlineError, FrameError, PipelineError, TrainingError)
}


class Board:
    """What is going on.

    Args:
        members: every device, by its credential or whatever else tells them apart.
        joins: whether devices must say that they are ready before they are told to train.
        attempts: of a client at one round; each after the first is made in a new generation of its pipeline.
            With 1, the first broken pipeline ends the round.

    Attributes:
        members: replaced, never changed, when a client is planned anew.
        bytes_up, bytes_down: of updates, and of stages handed out.
        faults: devices that were lost.
    """

    def __init__(self, members: Mapping[str, Member], *, joins: bool = False, attempts: int = 1) -> None:
        self.members: Mapping[str, Member] = dict(members)
        self._joining = Joining(is_needed=joins)
        self._attempts = Attempts(attempts)
        self._void: set[tuple[str, int]] = set()
        self._told: set[Member] = set()
        self._changed = threading.Condition()
        self._instruction = Instruction(kind="wait", reason="the first round has not begun")
        self._roll = Roll()
        self._states: dict[str, str] = {}
        self._addresses: dict[str, Address] = {}
        self._failure: FailureReport | None = None
        self._failed_s = 0.0
        self._is_nudged = False
        self._listeners: list[Callable[[], None]] = []
        self._progress: dict[str, ProgressReport] = {}
        self._last_heard_s: dict[tuple[str, str], float] = {}
        self.bytes_up = 0
        self.bytes_down = 0
        self.faults = 0

    # called by the round loop

    def open_round(
        self,
        round: int,
        cohort: Sequence[str],
        reported: Mapping[tuple[str, int], str] | None = None,
        *,
        late: Mapping[str, int] | None = None,
        spare: Sequence[str] = (),
        wanted: int | None = None,
        states: Mapping[str, str] | None = None,
    ) -> None:
        """Let the cohort begin.

        Args:
            round: its number.
            cohort: its clients.
            reported: updates that an earlier process of the coordinator left in the journal: their generation by
                client and rank.
            late: clients that go on with an earlier round: which.
            spare: clients that begin one by one, in this order, as others are done.
            wanted: whole clients that are enough; None for all.
            states: names what each client kept, from which it starts.
        """
        with self._changed:
            self._states = dict(states or {})
            self._roll.open(round, cohort, reported or {}, late=late or {}, spare=spare, wanted=wanted)
            self._progress = {name: report for name, report in self._progress.items() if name in (late or {})}
            self._attempts.open_round(late or {})
            self._note_arrivals()
            self._instruction = Instruction(kind="train", round=round)
            self._notify()

    def close_round(self, counted: Collection[str] = (), *, oldest: int | None = None) -> dict[str, int]:
        """Let devices wait while the coordinator aggregates.

        Args:
            counted: clients whose updates the round takes.
            oldest: the round from which a client may have begun to go on all the same; None stops all.

        Returns:
            Those who go on: with which round.
        """
        with self._changed:
            self._instruction = Instruction(kind="wait", round=self._instruction.round, reason="aggregating")
            late = self._roll.close(counted, self._attempts.given_up, oldest)
            self._notify()
            return late

    def stop(self, reason: str, *, is_last: bool = True) -> None:
        """Send every device home, or on to the next job."""
        with self._changed:
            kind: Literal["stop", "next"] = "stop" if is_last else "next"
            self._instruction = Instruction(kind=kind, round=self._instruction.round, reason=reason)
            self._notify()

    def wait_until_told(self, *, timeout_s: float) -> bool:
        """Wait until every device that a plan needs has asked, and been sent home.

        Also those that were not heard yet: after a restart they may still be about to come back.
        """
        needed = {member for member in self.members.values() if member.stages}
        with self._changed:
            return self._changed.wait_for(lambda: needed <= self._told, timeout_s)

    def wait_for_cohort(self, *, timeout_s: float) -> bool:
        """Wait until as many clients as are wanted have reported, or all that still can, or something fails.

        Args:
            timeout_s: return False after so long, or when there are incidents to tell, or after a nudge.

        Raises:
            FedmpError: a device reported a failure; of the kind that it reported.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._failure is not None and self._is_explained(self._failure):
                    raise _KINDS.get(self._failure.kind, RoundError)(self._failure.message)
                if not self._missing() or self._roll.is_enough(self._attempts.given_up):
                    return True
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or self._attempts.incidents or self._is_nudged:
                    self._is_nudged = False
                    return False
                self._changed.wait(left_s)

    def finished(self) -> tuple[str, ...]:
        """Clients of which every device has reported, in the order in which they were complete."""
        with self._changed:
            return self._roll.finished(self._attempts.given_up)

    def training(self) -> dict[str, int]:
        """The clients that take part in the open round, by the round from whose model they began."""
        with self._changed:
            return dict(self._roll.started)

    def given_up(self) -> dict[str, str]:
        """Clients of the cohort that will not finish the open round, and why."""
        with self._changed:
            return dict(self._attempts.given_up)

    def incidents(self) -> list[str]:
        """What happened to clients' pipelines since this was last asked, for people."""
        with self._changed:
            incidents, self._attempts.incidents = self._attempts.incidents, []
            return incidents

    @property
    def recoveries(self) -> int:
        """Attempts that clients made after their first."""
        with self._changed:
            return self._attempts.recoveries

    def missing(self) -> dict[str, list[int]]:
        """Stages of the cohort that have not reported, by client."""
        with self._changed:
            absent, missing = self._missing(), dict[str, list[int]]()
            for member in self.members.values():
                if (member.client, member.rank) in absent:
                    missing.setdefault(member.client, []).extend(member.stages)
            return {client: sorted(missing[client]) for client in sorted(missing)}

    def pushed_by(self, client: str, round: int) -> list[tuple[str, ...]]:
        """The tensors that each device of a client pushes in a round, in order of rank."""
        members = [member for member in self.members.values() if member.client == client and member.stages]
        return [member.pushed_in(round) for member in sorted(members, key=lambda member: member.rank)]

    def progress(self) -> dict[str, ProgressReport]:
        """The newest progress of each client in the open round."""
        with self._changed:
            return dict(self._progress)

    def silent_s(self, client: str) -> float | None:
        """Seconds since any device of a client was last heard; None if never."""
        with self._changed:
            heard = [at_s for (name, _), at_s in self._last_heard_s.items() if name == client]
            return time.monotonic() - max(heard) if heard else None

    def status(self) -> BoardStatus:
        """How things stand."""
        with self._changed:
            now_s = time.monotonic()
            return BoardStatus(
                kind=self._instruction.kind,
                round=self._instruction.round,
                cohort=tuple(self._roll.started),
                num_reported=len(self._roll.finished(self._attempts.given_up)),
                num_late=sum(begun < self._instruction.round for begun in self._roll.started.values()),
                silent_s={device: now_s - at_s for device, at_s in self._last_heard_s.items()},
                bytes_up=self.bytes_up,
                bytes_down=self.bytes_down,
            )

    # called by whoever starts devices

    @property
    def has_failed(self) -> bool:
        """Whether a device reported what no new attempt would mend."""
        with self._changed:
            return self._failure is not None

    def is_training(self, client: str) -> bool:
        """Whether the open round still waits for this client."""
        with self._changed:
            return any(name == client for name, _ in self._missing())

    def nudge(self) -> None:
        """Let whoever waits for the cohort look after the devices now, and not a moment later."""
        with self._changed:
            self._is_nudged = True
            self._changed.notify_all()

    def lost(self, incident: str, member: Member | None = None) -> None:
        """A device is gone.

        Args:
            incident: what happened, for people.
            member: the device, if it comes back to its place: its client begins anew without waiting until its
                neighbours have noticed and said so.
        """
        with self._changed:
            self.faults += 1
            self._attempts.incidents.append(incident)
            if member is not None and self._attempts.forget(member):
                self._begin_anew(member.client, f"device {member.device} was lost")

    def give_up(self, client: str, reason: str) -> None:
        """The client will not finish the open round."""
        with self._changed:
            self._attempts.given_up.setdefault(client, reason)
            self._note_arrivals()
            self._notify()

    def replace_client(self, client: str, members: Mapping[str, Member]) -> set[int] | None:
        """The client was planned anew: other devices, other stages. It begins the open round anew.

        Returns:
            Ranks of the old plan whose updates are void; None if nothing was replaced, since all of the
            client's updates are in.
        """
        with self._changed:
            if client in self._roll.started and not self.is_training(client):
                return None
            self._joining.forget(client)
            old = {member.rank for member in self.members.values() if member.client == client}
            if old:  # while the old members tell what is missing
                self._begin_anew(client, "its model is cut anew")
            others = {key: member for key, member in self.members.items() if member.client != client}
            self.members = {**others, **members}
            self._void = {(name, rank) for name, rank in self._void if name != client}
            self._notify()  # only now: whoever asked a moment ago was still taken for a member of the old plan
            return old

    # called by the service

    def join(self, member: Member, message: Ready) -> int | None:
        """A device can begin, or says why it cannot.

        Args:
            member: the device.
            message: what it says.

        Returns:
            Samples of the client; None while no device has told.

        Raises:
            RefusedError: it holds stages of another plan, or another device of the client holds another
                number of samples.
        """
        with self._changed:
            if message.plan != member.plan or member not in self.members.values():
                raise RefusedError(
                    f"the model of {member.client} was cut anew; ask for the job again",
                    status=409,
                    reason="other-plan",
                )
            num_samples = self._joining.join(member, message)
            self._notify()
            return num_samples

    def unable(self) -> dict[tuple[str, str], str]:
        """Devices that cannot take their place in a plan, by client and device, and why."""
        with self._changed:
            return self._joining.unable()

    def samples_of(self, client: str) -> int | None:
        """Samples of a client; None while none of its devices has told."""
        with self._changed:
            return self._joining.samples_of(client)

    def instruction_for(self, member: Member, process: str = "") -> Instruction:
        """What a device should do now.

        Args:
            member: the device.
            process: names its process; another one than before has lost what the earlier one knew.
        """
        with self._changed:
            if self._attempts.has_forgotten(member, process):
                self._begin_anew(member.client, f"device {member.device} was started anew")
            kind, round = self._instruction.kind, self._instruction.round
            if kind in ("stop", "next"):
                self._told.add(member)
                self._changed.notify_all()
                return self._instruction
            if member not in self.members.values():  # between asking who it is and this, it was planned anew
                return Instruction(kind="wait", round=round, reason=f"{member.client} is planned anew")
            if self._joining.must_join(member):
                return Instruction(kind="join", round=round, reason="say what you hold", plan=member.plan)
            if self._joining.is_unable(member):
                return Instruction(kind="wait", round=round, reason="this device cannot take its place")
            if not member.stages:
                return Instruction(kind="wait", round=round, reason="the plan leaves this device out")
            begun = self._roll.started.get(member.client)
            if kind == "train" and begun is None:
                return Instruction(kind="wait", round=round, reason="not in this round's cohort")
            if kind == "train" and (member.client, member.rank) in self._roll.reported:
                return Instruction(kind="wait", round=round, reason="this round's update is in")
            if kind == "train" and member.client in self._attempts.given_up:
                return Instruction(kind="wait", round=round, reason=self._attempts.given_up[member.client])
            if kind != "train" or begun is None:
                return self._instruction
            generation, attempt = self._attempts.tell(member)
            state = self._states.get(member.client, "")
            return Instruction(kind="train", round=begun, generation=generation, attempt=attempt, state=state)

    def window(self, round: int, client: str) -> Literal["open", "over", "not yet", "never", "not in cohort"]:
        """Whether a round takes a client's requests.

        It is open for the client, or for others only, or over, or may open soon, or is nobody's business now.
        """
        with self._changed:
            kind, current = self._instruction.kind, self._instruction.round
            if kind in ("stop", "next") or round < 1:
                return "over"
            if self._roll.started.get(client) == round:
                return "open"
            if kind == "train" and round >= current:
                return "not in cohort" if round == current else "never"
            return "over" if round <= current else "not yet"

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener`, which must not block, whenever something changes."""
        self._listeners.append(listener)

    def heard(self, member: Member) -> None:
        """A device of this client is alive."""
        with self._changed:
            self._last_heard_s[member.client, member.device] = time.monotonic()

    def reported(self, member: Member, round: int, num_bytes: int, generation: str = "") -> bool:
        """A device's update of a round is in the journal.

        Args:
            member, round: whose and of which round.
            num_bytes: its length.
            generation: of the client's pipeline that made it.

        Returns:
            Whether it counts; the round may have closed in the meantime, or the pipeline come up anew.
        """
        with self._changed:
            if self._instruction.kind in ("stop", "next") or self._roll.started.get(member.client) != round:
                return False
            if member not in self.members.values():  # its client's model was cut anew in the meantime
                return False
            address = self._addresses.get(member.client)
            if address is not None and generation != address.generation:
                return False
            if address is None and generation and self._attempts.is_coming_up(member.client):
                return False
            self._roll.reported[member.client, member.rank] = generation
            self.bytes_up += num_bytes
            self._note_arrivals()
            self._notify()
            return True

    def sent(self, num_bytes: int) -> None:
        """A global stage went out."""
        with self._changed:
            self.bytes_down += num_bytes

    def progressed(self, member: Member, report: ProgressReport) -> None:
        """A client got on."""
        with self._changed:
            if report.round == self._roll.started.get(member.client):
                self._progress[member.client] = report

    def failed(self, member: Member, report: FailureReport) -> None:
        """A device cannot go on; a cause is kept rather than the losses that follow from it.

        A broken pipeline is brought up anew while the client has attempts left, or if it broke off a round that was
        closed without it. So it is where devices join on their own account: one that gave up, whatever went wrong on
        its machine, is one that is lost.
        """
        is_mended = _is_consequence(report) or report.kind == FrameError.__name__
        if self._joining.is_needed:
            is_mended = report.kind not in _OF_ALL
        with self._changed:
            is_in_vain = report.round != self._roll.started.get(member.client)
            if is_mended and (self._attempts.most > 1 or is_in_vain):
                if report.generation >= self._attempts.generation(member.client):
                    self._begin_anew(member.client, report.message, after=report.generation)
                return
            if self._failure is None:
                self._failed_s = time.monotonic()
            if self._failure is None or (_is_consequence(self._failure) and not _is_consequence(report)):
                self._failure = report
            self._notify()

    def publish_address(self, member: Member, address: Address) -> list[int]:
        """The client's first device can be reached here.

        Returns:
            Ranks of the client whose updates of the open round are void: an earlier generation made
            them, and it did not get to make all of them.
        """
        with self._changed:
            if not self._attempts.came_up(member.client, address.number):
                return []
            self._addresses[member.client] = address
            void = [rank for client, rank in self._void if client == member.client]
            self._void -= {(member.client, rank) for rank in void}
            if member.client in {client for client, _ in self._missing()}:
                old = [
                    rank
                    for (client, rank), generation in self._roll.reported.items()
                    if client == member.client and generation != address.generation
                ]
                void += old
                for rank in old:
                    del self._roll.reported[member.client, rank]
            self._notify()
            return void

    def address_of(self, client: str) -> Address | None:
        """Where a client's first device listens; None if it has not said so."""
        with self._changed:
            return self._addresses.get(client)

    def _is_explained(self, failure: FailureReport) -> bool:
        """Whether the cause is known, or has had its time to become known."""
        return not _is_consequence(failure) or time.monotonic() - self._failed_s > _CAUSE_S

    def _begin_anew(self, client: str, incident: str, *, after: int = 0) -> None:
        """The client's pipeline is over; what it has not finished is void."""
        self._attempts.begin_generation(client, after)
        self._addresses.pop(client, None)
        if any(name == client for name, _ in self._missing()):
            for name, rank in [key for key in self._roll.reported if key[0] == client]:
                del self._roll.reported[name, rank]
                self._void.add((name, rank))
            self._attempts.begin_attempt(client, self._roll.started[client], incident)
            self._note_arrivals()
        self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    def _missing(self) -> set[tuple[str, int]]:
        return {
            (member.client, member.rank)
            for member in self._roll.missing(self.members.values())
            if member.client not in self._attempts.given_up
        }

    def _note_arrivals(self) -> None:
        self._roll.note_arrivals(self.members.values(), self._attempts.given_up)


def _is_consequence(report: FailureReport) -> bool:
    """Whether a device failed only because another one did."""
    return report.kind in ("PipelineError", "DeadlineError")
