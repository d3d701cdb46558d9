"""The notice board between the round loop and the devices' requests.

The round loop runs in one thread, the HTTP service in another. The board is all that they share: which
round is open for whom, which updates are in, who failed. Waiting on it is always bounded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedmp.errors import (
    DataError,
    DeadlineError,
    FedmpError,
    FrameError,
    PipelineError,
    RoundError,
    TrainingError,
)
from fedmp.records import Address, FailureReport, Instruction, ProgressReport

__all__ = ["Board", "BoardStatus", "Member"]

# a device that lost a peer says so at once; what happened to the peer is known a moment later
_CAUSE_S = 2.0

_KINDS: dict[str, type[FedmpError]] = {
    kind.__name__: kind for kind in (DataError, DeadlineError, FrameError, PipelineError, TrainingError)
}


@dataclass(frozen=True)
class Member:
    """A device that the coordinator knows.

    Attributes:
        client, device: names in the topology.
        rank: its number among the client's devices.
        stages: of the client's plan, that it runs.
        pulled: tensors that it pulls each round.
        pushed: tensors that it must push.
        stage_key: equal for devices that pull the same tensors.
        max_update_bytes: longest body that it may push.
    """

    client: str
    device: str
    rank: int
    stages: tuple[int, ...]
    pulled: tuple[str, ...]
    pushed: tuple[str, ...]
    stage_key: str
    max_update_bytes: int


@dataclass(frozen=True)
class BoardStatus:
    """How things stand.

    Attributes:
        kind: what the devices are told to do: "train", "wait" or "stop".
        round: the newest round that was opened; 0 before the first.
        cohort: its clients.
        num_reported: those of which every device has reported.
        silent_s: seconds since each device was last heard, by client and device; none that never was.
        bytes_up, bytes_down: bodies of accepted updates, and of stages handed out.
    """

    kind: str
    round: int
    cohort: tuple[str, ...]
    num_reported: int
    silent_s: Mapping[tuple[str, str], float]
    bytes_up: int
    bytes_down: int


class Board:
    """What is going on.

    Args:
        members: every device, by its credential or whatever else tells them apart.
    """

    def __init__(self, members: Mapping[str, Member]) -> None:
        self.members = dict(members)
        self._changed = threading.Condition()
        self._instruction = Instruction(kind="wait", reason="the first round has not begun")
        self._cohort: tuple[str, ...] = ()
        self._reported: set[tuple[str, int]] = set()
        self._addresses: dict[str, Address] = {}
        self._failure: FailureReport | None = None
        self._failed_s = 0.0
        self._listeners: list[Callable[[], None]] = []
        self._progress: dict[str, ProgressReport] = {}
        self._last_heard_s: dict[tuple[str, str], float] = {}
        self.bytes_up = 0
        self.bytes_down = 0

    # called by the round loop

    def open_round(self, round: int, cohort: Sequence[str], reported: Sequence[tuple[str, int]] = ()) -> None:
        """Let the cohort begin; updates of `reported` ranks are in the journal already."""
        with self._changed:
            self._cohort = tuple(cohort)
            self._reported = set(reported)
            self._progress = {}
            self._instruction = Instruction(kind="train", round=round)
            self._notify()

    def close_round(self) -> None:
        """Let devices wait while the coordinator aggregates."""
        with self._changed:
            self._instruction = Instruction(kind="wait", round=self._instruction.round, reason="aggregating")
            self._notify()

    def stop(self, reason: str) -> None:
        """Send every device home."""
        with self._changed:
            self._instruction = Instruction(kind="stop", round=self._instruction.round, reason=reason)
            self._notify()

    def wait_for_cohort(self, *, timeout_s: float) -> bool:
        """Wait until every device of the cohort has reported, or something fails.

        Args:
            timeout_s: return False after so long.

        Raises:
            FedmpError: a device reported a failure; of the kind that it reported.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._failure is not None and self._is_explained(self._failure):
                    raise _KINDS.get(self._failure.kind, RoundError)(self._failure.message)
                if not self._missing():
                    return True
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)

    def missing(self) -> dict[str, list[int]]:
        """Stages of the cohort that have not reported, by client."""
        with self._changed:
            absent, missing = self._missing(), dict[str, list[int]]()
            for member in self.members.values():
                if (member.client, member.rank) in absent:
                    missing.setdefault(member.client, []).extend(member.stages)
            return {client: sorted(missing[client]) for client in sorted(missing)}

    def pushed_by(self, client: str) -> list[tuple[str, ...]]:
        """The tensors that each device of a client pushes, in order of rank."""
        members = [member for member in self.members.values() if member.client == client]
        return [member.pushed for member in sorted(members, key=lambda member: member.rank)]

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
            absent = {client for client, _ in self._missing()}
            return BoardStatus(
                kind=self._instruction.kind,
                round=self._instruction.round,
                cohort=self._cohort,
                num_reported=len(set(self._cohort) - absent),
                silent_s={device: now_s - at_s for device, at_s in self._last_heard_s.items()},
                bytes_up=self.bytes_up,
                bytes_down=self.bytes_down,
            )

    # called by the service

    def instruction_for(self, member: Member) -> Instruction:
        """What a device should do now."""
        with self._changed:
            if self._instruction.kind != "train":
                return self._instruction
            round = self._instruction.round
            if member.client not in self._cohort:
                return Instruction(kind="wait", round=round, reason="not in this round's cohort")
            if (member.client, member.rank) in self._reported:
                return Instruction(kind="wait", round=round, reason="this round's update is in")
            return self._instruction

    def takes_part(self, member: Member) -> bool:
        """Whether the device's client is in the cohort of the open round."""
        with self._changed:
            return self._instruction.kind == "train" and member.client in self._cohort

    def window(self, round: int) -> Literal["open", "over", "not yet", "never"]:
        """Whether a round takes requests: it is open, or over, or may open soon, or is nobody's business now."""
        with self._changed:
            kind, current = self._instruction.kind, self._instruction.round
            if kind == "stop" or round < current or round < 1:
                return "over"
            if kind == "train":
                return "open" if round == current else "never"
            return "over" if round == current else "not yet"

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener`, which must not block, whenever something changes."""
        self._listeners.append(listener)

    def heard(self, member: Member) -> None:
        """A device of this client is alive."""
        with self._changed:
            self._last_heard_s[member.client, member.device] = time.monotonic()

    def reported(self, member: Member, round: int, num_bytes: int) -> bool:
        """A device's update of a round is in the journal.

        Returns:
            Whether it counts; the round may have closed in the meantime.
        """
        with self._changed:
            if self._instruction.kind != "train" or self._instruction.round != round:
                return False
            self._reported.add((member.client, member.rank))
            self.bytes_up += num_bytes
            self._notify()
            return True

    def sent(self, num_bytes: int) -> None:
        """A global stage went out."""
        with self._changed:
            self.bytes_down += num_bytes

    def progressed(self, member: Member, report: ProgressReport) -> None:
        """A client got on."""
        with self._changed:
            if report.round == self._instruction.round:
                self._progress[member.client] = report

    def failed(self, report: FailureReport) -> None:
        """A device cannot go on; a cause is kept rather than the losses that follow from it."""
        with self._changed:
            if self._failure is None:
                self._failed_s = time.monotonic()
            if self._failure is None or (_is_consequence(self._failure) and not _is_consequence(report)):
                self._failure = report
            self._notify()

    def publish_address(self, member: Member, address: Address) -> None:
        """The client's first device can be reached here."""
        with self._changed:
            self._addresses[member.client] = address
            self._notify()

    def address_of(self, client: str) -> Address | None:
        """Where a client's first device listens; None if it has not said so."""
        with self._changed:
            return self._addresses.get(client)

    def _is_explained(self, failure: FailureReport) -> bool:
        """Whether the cause is known, or has had its time to become known."""
        return not _is_consequence(failure) or time.monotonic() - self._failed_s > _CAUSE_S

    def _notify(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    def _missing(self) -> set[tuple[str, int]]:
        return {
            (member.client, member.rank) for member in self.members.values() if member.client in self._cohort
        } - self._reported


def _is_consequence(report: FailureReport) -> bool:
    """Whether a device failed only because another one did."""
    return report.kind in ("PipelineError", "DeadlineError")
