"""The deployed engine: the coordinator as a service, for devices that dial in from their own machines."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

import fedmp
from fedmp.component import Component
from fedmp.coordinator import (
    Board,
    CoordinatorService,
    Journal,
    Limits,
    Member,
    Opening,
    RemoteClients,
    RoundSettings,
    Tls,
    Trained,
    check_address,
)
from fedmp.engine.agreement import agreement_of, job_name
from fedmp.engine.attendance import Attendance, Patience
from fedmp.engine.job import Job
from fedmp.engine.plan_book import PlanBook
from fedmp.engine.prepare import Prepared, prepare_without_clients_data
from fedmp.engine.session import Outcome, Session, Timelines, make_journal, round_settings, run_session
from fedmp.errors import ConfigError, FedmpError, RefusedError, RoundError
from fedmp.identity import CredentialStore
from fedmp.records import JobOffer, Note

__all__ = ["DeployEngine"]

_HEARTBEAT_S = 5.0


class DeployEngine(Component):
    """A coordinator that listens for devices.

    Args:
        host: address to listen on; the default is for trying things out on one machine.
        port: to listen on.
        folder: where `fedmp certs` and `fedmp enroll` left their files.
        credentials: the list of enrolled devices; None for `devices.json` in the folder.
        certificate, key: the coordinator's own; None for `server.pem` and `server-key.pem` in the folder, or
            none where they are not there.
        mutual_tls: ask devices for certificates of the authority `ca.pem` in the folder as well.
        insecure: listen beyond this machine without TLS all the same.
        open_metrics: answer `/metrics` to other machines too.
        round_timeout_s: a round that takes longer fails; in the first one devices may still be starting.
        farewell_s: how long to wait at the end until every device has heard of it.
        stall_timeout_s: longest pause within a transfer.
        attempts: of a client at one round, whose pipeline breaks or whose devices are started anew.
        wait_s: how long devices that have not been heard yet are waited for, before their client is cut over
            the others; they may join a running job later.
        absence_s: a device that is silent for so long is lost, and its client cut over the others.
        stranded_s: how long a client that no plan fits any more is waited for, where the round cannot do
            without it.
        more_to_come: send devices on to a next job at the end instead of home.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8470, ge=0, lt=65536)
    folder: Path = Path("federation")
    credentials: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    mutual_tls: bool = False
    insecure: bool = False
    open_metrics: bool = False
    round_timeout_s: float = Field(default=24 * 3600.0, gt=0)
    farewell_s: float = Field(default=15.0, ge=0)
    stall_timeout_s: float = Field(default=30.0, gt=0)
    attempts: int = Field(default=8, ge=1)
    wait_s: float = Field(default=300.0, ge=0)
    absence_s: float = Field(default=60.0, gt=0)
    stranded_s: float = Field(default=3600.0, ge=0)
    more_to_come: bool = False

    @property
    def name(self) -> str:
        """`deploy`."""
        return "deploy"

    def warm_up(self) -> None:
        """Check what can be checked before the run directory is written to.

        Raises:
            ConfigError: the address is in use, a certificate cannot be used, nobody is enrolled, or the
                service would be open to strangers.
        """
        tls = self.tls()
        if tls is not None:
            tls.check()
        elif not _is_loopback(self.host) and not self.insecure:
            raise ConfigError(
                f"the coordinator would listen on {self.host} without TLS, so anyone on the way could read and "
                f"change credentials, updates and the model; make certificates with `fedmp certs HOST`, or, if that "
                f"is what you want, say engine.insecure=true"
            )
        if self.mutual_tls and tls is None:
            raise ConfigError("mutual TLS needs the coordinator's own certificate too: `fedmp certs HOST`")
        if not self.store().enrolled():
            raise ConfigError(
                f"no device is enrolled in {self.store().path}; enroll each with `fedmp enroll CLIENT/DEVICE`"
            )
        check_address(self.host, self.port)

    def tls(self) -> Tls | None:
        """The certificates to use; None for plain HTTP."""
        certificate = self.certificate or self.folder / "server.pem"
        key = self.key or self.folder / "server-key.pem"
        if self.certificate is None and self.key is None and not certificate.exists():
            return None
        return Tls(certificate, key, self.folder / "ca.pem" if self.mutual_tls else None)

    def store(self) -> CredentialStore:
        """The enrolled devices."""
        return CredentialStore(self.credentials or self.folder / "devices.json")

    def prepare(self, job: Job) -> Prepared:
        """What a coordinator knows of the job; the clients' data stay where they are.

        Raises:
            FedmpError: the job cannot be prepared.
        """
        return prepare_without_clients_data(job)

    def run(self, session: Session) -> Outcome:
        """Serve the job until its last round is committed.

        Left by an interrupt, the devices are told nothing: they wait for the coordinator to come back. So they
        are if a round could not be closed or the disk is full, which whoever runs the coordinator can mend.

        Raises:
            FedmpError: a device failed, a round did not close in time, or the disk is full.
        """
        board = Board({}, joins=True, attempts=self.attempts)
        journal = make_journal(session)
        settings = round_settings(session)
        attendance = self._attendance(session, board, journal, settings)
        clients = _Attending(
            attendance,
            RemoteClients(
                board,
                journal,
                session.model,
                predicted_s=settings.predicted_s,
                round_timeout_s=self.round_timeout_s,
                watch=attendance.check,
                observe=session.observe,
            ),
        )
        timelines = Timelines()
        service = CoordinatorService(
            board,
            journal,
            session.model,
            host=self.host,
            port=self.port,
            identify=_doorkeeper(self.store(), board),
            tls=self.tls(),
            limits=Limits(stall_timeout_s=self.stall_timeout_s),
            open_metrics=self.open_metrics,
            offer=_offers(session, attendance, heartbeat_s=min(self.absence_s / 4, _HEARTBEAT_S)),
        )

        with service:
            session.observe(Note(f"listening on {service.url}"))
            startup_s = time.monotonic() - session.started_s
            try:
                records = run_session(session, settings, clients, timelines)
            except (RoundError, ConfigError):  # which whoever runs the coordinator can mend: the devices wait
                raise
            except FedmpError as error:
                self._say_farewell(board, str(error))
                raise
            self._say_farewell(board, "the job is over")
        return Outcome(records, startup_s, timelines.by_client)

    def _attendance(
        self, session: Session, board: Board, journal: Journal, settings: RoundSettings
    ) -> Attendance:
        held, samples, predicted = settings.num_samples, settings.round_samples, settings.predicted_s
        assert isinstance(held, dict)
        assert isinstance(samples, dict)
        assert isinstance(predicted, dict)
        return Attendance(
            session.prepared,
            board,
            journal,
            book=PlanBook(session.journal_folder / "plans.json"),
            patience=Patience(self.wait_s, self.absence_s, self.stranded_s),
            num_samples=held,
            round_samples=samples,
            predicted_s=predicted,
            observe=session.observe,
        )

    def _say_farewell(self, board: Board, reason: str) -> None:
        board.stop(reason, is_last=not self.more_to_come)
        board.wait_until_told(timeout_s=self.farewell_s)


@dataclass(frozen=True)
class _Attending:
    """The clients, each cut anew over the devices that are there when a round begins."""

    attendance: Attendance
    remote: RemoteClients

    def train(self, opening: Opening) -> Trained:
        self.attendance.begin_round(num_spare=opening.num_clients - opening.closing.minimum)
        return self.remote.train(opening)

    def unreachable(self) -> frozenset[str]:
        return self.remote.unreachable()

    def committed(self, round: int) -> None:
        self.remote.committed(round)


def _doorkeeper(store: CredentialStore, board: Board) -> Callable[[str], Member]:
    """Who asks, by the token that they show."""

    def identify(token: str) -> Member:
        identity = store.identify(token)
        if identity is None:
            raise RefusedError("unknown credential", status=401, reason="unknown-credential")
        name = f"{identity.client}/{identity.device}"
        if identity.is_revoked:
            raise RefusedError(f"the credential of {name} was revoked", status=403, reason="revoked")
        member = board.members.get(name)
        if member is None:
            raise RefusedError(
                f"{name} is not in the topology of this job", status=403, reason="not-in-topology"
            )
        return member

    return identify


def _offers(session: Session, attendance: Attendance, *, heartbeat_s: float) -> Callable[[Member], JobOffer]:
    """The job as each device needs to know it."""
    prepared = session.prepared
    agreed = agreement_of(session.config)
    names = list(prepared.clients)

    def offer(member: Member) -> JobOffer:
        return JobOffer(
            job=job_name(agreed, prepared.graph.fingerprint),
            client=member.client,
            device=member.device,
            client_index=names.index(member.client),
            num_clients=len(names),
            plan=attendance.setup_of(member.client).plan,
            fingerprint=prepared.graph.fingerprint,
            agreed=agreed,
            sample_shape=prepared.sample_shape,
            sample_dtype=str(prepared.sample_dtype).removeprefix("torch."),
            record_timeline=prepared.job.trace or member.client == names[0],
            versions={"fedmp": fedmp.__version__, "torch": torch.__version__},
            heartbeat_s=heartbeat_s,
        )

    return offer


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
