"""The local engine: the coordinator and every device as a real process on this machine, over loopback."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import secrets
import signal
import threading
import time
from multiprocessing.process import BaseProcess

from pydantic import Field

from fedmp.client import DeviceSpec, run_device
from fedmp.component import Component
from fedmp.coordinator import (
    Board,
    CoordinatorService,
    Journal,
    Member,
    check_address,
    run_rounds,
)
from fedmp.engine.members import members_of
from fedmp.engine.prepare import Prepared, part_of
from fedmp.engine.session import Outcome, Session, Timelines, evaluator, round_settings
from fedmp.errors import FederationError

__all__ = ["LocalEngine"]

_GRACE_S = 3.0


class LocalEngine(Component):
    """Real processes, real sockets.

    Args:
        host: loopback address of the coordinator and of the pipelines.
        port: of the coordinator; 0 picks a free one.
        backend: of torch.distributed, between a client's devices.
        num_threads: of each device process.
        round_timeout_s: a round that takes longer fails.
        transfer_timeout_s: deadline of one transfer between devices.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, lt=65536)
    backend: str = "gloo"
    num_threads: int = Field(default=1, ge=1)
    round_timeout_s: float = Field(default=3600.0, gt=0)
    transfer_timeout_s: float = Field(default=120.0, gt=0)

    @property
    def name(self) -> str:
        """`local`."""
        return "local"

    def warm_up(self) -> None:
        """Let the fork server import torch while this process traces and plans.

        Raises:
            ConfigError: the address is in use; better said before the run directory is written to.
        """
        check_address(self.host, self.port)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fedmp.engine.preload"])
        multiprocessing.forkserver.ensure_running()

    def run(self, session: Session) -> Outcome:
        """Start the processes, run the rounds, and leave nothing running.

        Raises:
            FedmpError: a device failed, or the address is in use.
        """
        prepared = session.prepared
        members = {secrets.token_urlsafe(32): member for member in members_of(prepared) if member.stages}
        board = Board(members)
        journal = Journal(session.journal_folder, prepared.graph.state)
        timelines = Timelines()

        with CoordinatorService(board, journal, session.model, host=self.host, port=self.port) as service:
            processes = _Processes()
            try:
                for token, member in members.items():
                    processes.start(member, self._spec(service.url, token, member, prepared))
                startup_s = time.monotonic() - session.started_s
                records = run_rounds(
                    round_settings(session, self.round_timeout_s),
                    strategy=prepared.job.strategy,
                    aggregator=prepared.job.aggregator,
                    model=session.model,
                    board=board,
                    journal=journal,
                    checkpoints=session.checkpoints,
                    evaluate=evaluator(session),
                    watch=processes.check,
                    observe=session.observe,
                    on_reports=timelines.keep,
                )
            finally:
                board.stop("the job is over")
                processes.join()
        return Outcome(tuple(records), startup_s, timelines.by_client)

    def _spec(self, url: str, token: str, member: Member, prepared: Prepared) -> DeviceSpec:
        setup = prepared.clients[member.client]
        blueprints = tuple(setup.blueprints[stage] for stage in member.stages)
        return DeviceSpec(
            url=url,
            token=token,
            client=member.client,
            device=member.device,
            rank=member.rank,
            placement=setup.plan.placement,
            blueprints=blueprints,
            dataset=part_of(setup.own_samples, blueprints),
            num_samples=len(setup.own_samples),
            task=prepared.job.task,
            work=setup.work,
            options=prepared.job.pipeline.options(),
            keep_statistics_local=prepared.job.strategy.keep_statistics_local,
            record_timeline=prepared.job.trace or member.client == next(iter(prepared.clients)),
            host=self.host,
            backend=self.backend,
            num_threads=self.num_threads,
            timeout_s=self.transfer_timeout_s,
        )


class _Processes:
    """The device processes of a run."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._running: list[tuple[Member, BaseProcess]] = []
        self._died_s: float | None = None

    def start(self, member: Member, spec: DeviceSpec) -> None:
        """Start one device."""
        process = self._context.Process(
            target=_device_main, args=(spec,), name=f"fedmp {member.client}/{member.device}", daemon=True
        )
        process.start()
        self._running.append((member, process))

    def check(self) -> None:
        """Raise if a device process died without a word; a moment is left for its last words to arrive."""
        for member, process in self._running:
            if (
                process.exitcode is not None and process.exitcode < 0
            ):  # by a signal, which allows no last words
                name = signal.Signals(-process.exitcode).name
                raise FederationError(
                    f"{_describe(member)} was killed by {name} (exit code {process.exitcode}); if nobody did "
                    f"that, the machine ran out of memory: use fewer devices"
                )
        for member, process in self._running:
            if process.exitcode is not None:
                self._died_s = self._died_s or time.monotonic()
                if time.monotonic() - self._died_s > _GRACE_S:
                    raise FederationError(
                        f"{_describe(member)} ended with exit code {process.exitcode} before the job was over"
                    )

    def join(self) -> None:
        """Wait a moment for every device to go home, then make sure of it."""
        deadline_s = time.monotonic() + _GRACE_S
        for _, process in self._running:
            process.join(max(0.0, deadline_s - time.monotonic()))
        for _, process in self._running:
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._running = []


def _device_main(spec: DeviceSpec) -> None:
    # an interrupt at the terminal is the parent's to handle: it stops its devices in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="fedmp-parent", daemon=True).start()
    raise SystemExit(run_device(spec))


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its devices, so they watch for its end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _describe(member: Member) -> str:
    noun = "stages" if len(member.stages) > 1 else "stage"
    return f"device {member.device} of {member.client} ({noun} {', '.join(map(str, member.stages))})"
