"""The local engine: the coordinator and every device as a real process on this machine, over loopback."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import Field

from fedmp.client import DeviceSpec, Emulation
from fedmp.component import Component
from fedmp.coordinator import Board, CoordinatorService, Member, RemoteClients, check_address
from fedmp.engine.client_plan import part_of
from fedmp.engine.fleet import Fleet
from fedmp.engine.job import Job
from fedmp.engine.prepare import Prepared, prepare
from fedmp.engine.session import Outcome, Session, Timelines, make_journal, round_settings, run_session
from fedmp.engine.setup import ClientSetup
from fedmp.pipeline import Pace

__all__ = ["LocalEngine"]

_HEARTBEAT_S = 5.0


class LocalEngine(Component):
    """Real processes, real sockets.

    Args:
        host: loopback address of the coordinator and of the pipelines.
        port: of the coordinator; 0 picks a free one.
        backend: of torch.distributed, between a client's devices.
        num_threads: of each device process.
        round_timeout_s: a round that takes longer fails.
        transfer_timeout_s: deadline of one transfer between devices.
        heal: False ends the run at the first device that is lost.
        restarts: of each device that is lost; after so many its client goes on without it, if a plan fits the
            others, and sits the round out otherwise.
        attempts: of a client at one round.
        silence_timeout_s: a device that is not heard for so long hangs, and is lost.
        emulate: devices and links take as long as the topology says, where they are faster here.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, lt=65536)
    backend: str = "gloo"
    num_threads: int = Field(default=1, ge=1)
    round_timeout_s: float = Field(default=3600.0, gt=0)
    transfer_timeout_s: float = Field(default=120.0, gt=0)
    heal: bool = True
    restarts: int = Field(default=3, ge=0)
    attempts: int = Field(default=8, ge=2)
    silence_timeout_s: float = Field(default=30.0, gt=0)
    emulate: bool = False

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

    def prepare(self, job: Job) -> Prepared:
        """All of the job: the clients' data are dealt out from here.

        Raises:
            FedmpError: the job cannot be prepared.
        """
        return prepare(job)

    def run(self, session: Session) -> Outcome:
        """Start the processes, run the rounds, and leave nothing running.

        Raises:
            FedmpError: a device failed, or the address is in use.
        """
        prepared = session.prepared
        board = Board({}, attempts=self.attempts if self.heal else 1)
        journal = make_journal(session)
        timelines = Timelines()

        with CoordinatorService(board, journal, session.model, host=self.host, port=self.port) as service:
            fleet = Fleet(
                prepared,
                board,
                journal,
                make_spec=partial(self._spec, service.url, prepared, session.state_folder),
                restarts=self.restarts if self.heal else None,
                silence_timeout_s=self.silence_timeout_s,
            )
            try:
                fleet.start()
                startup_s = time.monotonic() - session.started_s
                settings = round_settings(session)
                clients = RemoteClients(
                    board,
                    journal,
                    session.model,
                    predicted_s=settings.predicted_s,
                    round_timeout_s=self.round_timeout_s,
                    watch=fleet.check,
                    observe=session.observe,
                )
                records = run_session(session, settings, clients, timelines)
            finally:
                board.stop("the job is over")
                fleet.end()
        return Outcome(records, startup_s, timelines.by_client)

    def _spec(
        self,
        url: str,
        prepared: Prepared,
        state_folder: Path,
        setup: ClientSetup,
        member: Member,
        token: str,
    ) -> DeviceSpec:
        blueprints = tuple(setup.blueprints[stage] for stage in member.stages)
        name = f"{member.client}/{member.device}"
        options = prepared.job.pipeline.options()
        emulation = emulation_of(setup, member) if self.emulate else None
        if emulation is not None:
            options = replace(options, pace=emulation.paces)
        return DeviceSpec(
            url=url,
            token=token,
            client=member.client,
            device=member.device,
            rank=member.rank,
            placement=setup.plan.placement,
            blueprints=blueprints,
            dataset=part_of(setup.own_samples, blueprints),
            num_samples=setup.num_samples,
            task=prepared.job.task,
            work=setup.work,
            options=options,
            uplink=prepared.job.uplink_channel(prepared.graph.state),
            downlink=prepared.job.downlink_channel(prepared.graph.state),
            state_folder=state_folder,
            record_timeline=prepared.job.trace or member.client == next(iter(prepared.clients)),
            host=self.host,
            backend=self.backend,
            num_threads=self.num_threads,
            planned_bytes=setup.plan.memory_bytes(member.device),
            memory_bytes=setup.plan.device_memory_bytes(member.device),
            timeout_s=self.transfer_timeout_s,
            heartbeat_s=min(self.silence_timeout_s / 4, _HEARTBEAT_S),
            faults=tuple(fault for fault in prepared.job.faults if fault.device == name),
            emulation=emulation,
        )


def emulation_of(setup: ClientSetup, member: Member) -> Emulation:
    """The device of a topology that a process stands for: as fast as its client's plan expects of it."""
    plan = setup.plan
    return Emulation(
        paces={
            stage: Pace(plan.stages[stage].forward_s, plan.stages[stage].backward_s)
            for stage in member.stages
        },
        uplink=setup.client.uplink,
        links={
            rank: setup.client.links.between(member.device, device)
            for rank, device in enumerate(plan.devices)
            if device != member.device
        },
    )
