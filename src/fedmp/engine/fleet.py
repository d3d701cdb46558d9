"""The device processes of a local run, and what is done when one of them is lost.

The ladder, cheapest first: the device is started again, and its client meets in the next generation of its
pipeline; the client's model is cut anew over the devices that are left; the client sits the round out, and
tries again with all of its devices in the next one.
"""

from __future__ import annotations

import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from fedmp.client import DeviceSpec
from fedmp.coordinator import Board, Journal, Member
from fedmp.engine.client_plan import plan_anew
from fedmp.engine.members import members_of_client
from fedmp.engine.prepare import Prepared
from fedmp.engine.processes import DeviceProcesses
from fedmp.engine.setup import ClientSetup
from fedmp.errors import FederationError, PlanError

__all__ = ["Fleet"]

_GRACE_S = 3.0
_COME_UP_S = 60.0  # fifty processes on two cores take their time

MakeSpec = Callable[[ClientSetup, Member, str], DeviceSpec]


@dataclass
class _Running:
    """A device process."""

    token: str
    member: Member
    process: BaseProcess
    started_s: float


@dataclass
class _ClientFleet:
    """The devices of one client.

    Attributes:
        whole: the client with all of its devices.
        setup: as it is now.
        running: its processes.
        restarts: of each device.
        gone: devices that are not started again.
        sits_out: the round that the client does not finish; 0 if none.
    """

    whole: ClientSetup
    setup: ClientSetup
    running: list[_Running] = field(default_factory=list)
    restarts: Counter[str] = field(default_factory=Counter)
    gone: set[str] = field(default_factory=set)
    sits_out: int = 0


class Fleet:
    """Starts devices, watches over them, ends them.

    Args:
        prepared: the job.
        board, journal: of the coordinator.
        make_spec: what a device needs to know.
        restarts: of each device that is lost; None raises when the first one is.
        silence_timeout_s: a device that is not heard for so long is lost.
    """

    def __init__(
        self,
        prepared: Prepared,
        board: Board,
        journal: Journal,
        *,
        make_spec: MakeSpec,
        restarts: int | None,
        silence_timeout_s: float,
    ) -> None:
        self._prepared = prepared
        self._board = board
        self._journal = journal
        self._make_spec = make_spec
        self._restarts = restarts
        self._silence_timeout_s = silence_timeout_s
        self._processes = DeviceProcesses(with_spare=bool(restarts), on_end=board.nudge)
        self._clients = {name: _ClientFleet(setup, setup) for name, setup in prepared.clients.items()}
        self._died_s: float | None = None

    def start(self) -> None:
        """Start every device."""
        for fleet in self._clients.values():
            self._enroll(fleet.setup)
        for fleet in self._clients.values():
            self._start_all(fleet)

    def check(self) -> None:
        """See to the devices that were lost; called at once when a process ends, and several times a second.

        Raises:
            FederationError: one was lost, and none is to be started again.
        """
        self._processes.stand_by()
        silent_s, given_up = self._board.status().silent_s, self._board.given_up()
        for name, fleet in self._clients.items():
            if name in given_up and not fleet.sits_out:
                self._sit_out(fleet, given_up[name])
            if fleet.sits_out:
                if self._journal.round > fleet.sits_out:
                    self._bring_back(fleet)
                continue
            for running in list(fleet.running):
                if self._restarts is None:
                    self._check_alive(running)
                    continue
                how = ""
                if running.process.exitcode is not None:
                    how = _how_it_ended(running.process)
                elif self._hangs(running, silent_s.get((name, running.member.device))):
                    how = f"silent for {self._silence_timeout_s:g} s"
                if how:
                    self._lose(fleet, running, how)
                    break  # the list is another one now

    def _hangs(self, running: _Running, silence_s: float | None) -> bool:
        age_s = time.monotonic() - running.started_s
        if silence_s is None or silence_s > age_s:  # it has not come up yet
            return age_s > max(self._silence_timeout_s, _COME_UP_S)
        return silence_s > self._silence_timeout_s

    def end(self) -> None:
        """Wait a moment for every device to go home, then make sure of it."""
        deadline_s = time.monotonic() + _GRACE_S
        every = [running.process for fleet in self._clients.values() for running in fleet.running]
        for process in every:
            process.join(max(0.0, deadline_s - time.monotonic()))
        for fleet in self._clients.values():
            self._kill_all(fleet)
        self._processes.close()

    def _check_alive(self, running: _Running) -> None:
        """Raise if a device process died; a moment is left for its last words to arrive, if it had any."""
        process = running.process
        if process.exitcode is None:
            return
        if process.exitcode < 0:  # by a signal, which allows no last words
            raise FederationError(
                f"{_describe(running.member)} was {_how_it_ended(process)}; if nobody did that, the machine "
                f"ran out of memory: use fewer devices"
            )
        self._died_s = self._died_s or time.monotonic()
        if time.monotonic() - self._died_s > _GRACE_S:
            raise FederationError(
                f"{_describe(running.member)} {_how_it_ended(process)} before the job was over"
            )

    def _lose(self, fleet: _ClientFleet, running: _Running, how: str) -> None:
        """One step of the ladder."""
        member = running.member
        if self._board.has_failed:
            return  # whatever it is, it ends the run and is more telling
        assert self._restarts is not None
        if fleet.restarts[member.device] < self._restarts:
            fleet.restarts[member.device] += 1
            self._board.lost(f"{_describe(member)} was lost ({how}) and is started again", member)
            _kill(running.process)
            fleet.running.remove(running)
            self._start(fleet, running.token, member)
            return
        if not self._board.is_training(fleet.whole.name):
            return  # its updates are in: time enough when the next round begins
        _stop(running.process)
        gone = {*fleet.gone, member.device}
        left = [device for device in fleet.whole.client.devices if device.name not in gone]
        lost = f"{_describe(member)} was lost ({how}) and does not come back"
        try:
            if not left:
                raise PlanError("no device is left")
            setup = plan_anew(self._prepared, fleet.whole, left)
        except PlanError as error:
            self._board.lost(lost)
            self._sit_out(fleet, f"{lost}; {error}")
            return
        if self._enroll(setup):
            fleet.gone, fleet.setup = gone, setup
            self._kill_all(fleet)
            self._start_all(fleet)
            self._board.lost(f"{lost}; its client goes on over {', '.join(setup.plan.devices)}")

    def _sit_out(self, fleet: _ClientFleet, reason: str) -> None:
        fleet.sits_out = self._journal.round
        self._kill_all(fleet)
        self._board.give_up(fleet.whole.name, reason)

    def _bring_back(self, fleet: _ClientFleet) -> None:
        """The client tries again with all of its devices."""
        fleet.sits_out = 0
        fleet.restarts.clear()
        fleet.gone.clear()
        fleet.setup = fleet.whole
        self._enroll(fleet.setup)
        self._start_all(fleet)

    def _enroll(self, setup: ClientSetup) -> bool:
        """Make the client's devices, as they are planned now, known to the board.

        Returns:
            Whether they are; else what the earlier ones did has just been completed.
        """
        members = {
            secrets.token_urlsafe(32): member
            for member in members_of_client(self._prepared, setup)
            if member.stages
        }
        void = self._board.replace_client(setup.name, members)
        for rank in void or ():
            self._journal.discard(setup.name, rank)
        return void is not None

    def _start_all(self, fleet: _ClientFleet) -> None:
        for token, member in self._board.members.items():
            if member.client == fleet.whole.name:
                self._start(fleet, token, member)

    def _start(self, fleet: _ClientFleet, token: str, member: Member) -> None:
        spec = self._make_spec(fleet.setup, member, token)
        name = f"fedmp {member.client}/{member.device}"
        process = self._processes.start(name, spec)
        fleet.running.append(_Running(token, member, process, time.monotonic()))

    def _kill_all(self, fleet: _ClientFleet) -> None:
        for running in fleet.running:
            _kill(running.process)
        fleet.running = []


def _stop(process: BaseProcess) -> None:
    if process.is_alive():
        process.kill()
        process.join()


def _kill(process: BaseProcess) -> None:
    _stop(process)
    process.close()


def _how_it_ended(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name} (exit code {code})"
    return f"ended with exit code {code}"


def _describe(member: Member) -> str:
    noun = "stages" if len(member.stages) > 1 else "stage"
    return f"device {member.device} of {member.client} ({noun} {', '.join(map(str, member.stages))})"
