"""The coordinator's HTTP service: devices dial in, pull their stages, push their update.

Control messages are validated JSON, tensors are safetensors files, streamed from and to disk. A request
is answered on the spot or, where a device asks what to do next, held back until there is news. What is
refused is answered with a sentence and a word, logged, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

from fedmp.coordinator.board import Board
from fedmp.coordinator.border import content_encoding, read_message, stream_to_file
from fedmp.coordinator.global_model import GlobalModel
from fedmp.coordinator.guard import Limits
from fedmp.coordinator.journal import Journal
from fedmp.coordinator.members import Member
from fedmp.coordinator.metrics import CountedApp, Metrics
from fedmp.coordinator.server import HttpServer, Tls
from fedmp.errors import RefusedError
from fedmp.records import (
    Address,
    FailureReport,
    Instruction,
    JobOffer,
    Joined,
    ProgressReport,
    Ready,
    Receipt,
)
from fedmp.updates import CONTENT_ENCODING

__all__ = ["CoordinatorService"]

_SOON_S = 1  # when to ask again for what is not ready yet
_CHECKS_AT_ONCE = 2  # each holds a tensor in memory; more would not be faster either

_log = logging.getLogger("fedmp.coordinator")

_News = TypeVar("_News")


class CoordinatorService:
    """Serves one job. Use it as a context manager.

    Args:
        board, journal, model: shared with the round loop.
        host, port: where to listen; port 0 picks a free one.
        identify: whose token it is; None takes the names of the board's members for tokens.
        tls: the coordinator's certificate; None speaks plain HTTP.
        limits: what a peer may take.
        open_metrics: answer `/metrics` to everyone instead of to this machine alone.
        offer: the job as a device is told it; None where devices know it already.

    Raises:
        ConfigError: the address or the certificate cannot be used.
    """

    def __init__(
        self,
        board: Board,
        journal: Journal,
        model: GlobalModel,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        identify: Callable[[str], Member] | None = None,
        tls: Tls | None = None,
        limits: Limits | None = None,
        open_metrics: bool = False,
        offer: Callable[[Member], JobOffer] | None = None,
    ) -> None:
        self._board = board
        self._journal = journal
        self._model = model
        self._identify = identify or _by_token(board)
        self._limits = limits or Limits()
        self._open_metrics = open_metrics
        self._offer = offer
        self.metrics = Metrics(board)
        self._waiting: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writing = asyncio.Lock()
        self._checking = asyncio.Semaphore(_CHECKS_AT_ONCE)
        self._taking: defaultdict[Member, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._ready = threading.Event()
        self._is_closing = False
        self.app = self._make_app()
        self._server = HttpServer(
            CountedApp(self.app, self.metrics),
            host=host,
            port=port,
            tls=tls,
            limits=self._limits,
            on_cut=self._note_cut,
        )
        self.url = self._server.url

    def __enter__(self) -> CoordinatorService:
        self._server.start(self._ready)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing = True
        self._wake()  # whoever is held back asks again, elsewhere or later
        self._server.stop()

    def _make_app(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            self._loop = asyncio.get_running_loop()
            self._board.listen(self._wake)
            self._ready.set()
            yield

        app = FastAPI(title="fedmp coordinator", lifespan=lifespan, docs_url=None, redoc_url=None)
        for kind in (RefusedError, RequestValidationError, HTTPException):
            app.add_exception_handler(kind, self._refuse)
        add = app.add_api_route
        add("/health", self.health, methods=["GET"])
        add("/ready", self.readiness, methods=["GET"], response_model=None)
        add("/metrics", self.prometheus, methods=["GET"], response_model=None)
        if self._offer is not None:
            add("/v1/job", self.job, methods=["GET"])
            add("/v1/ready", self.ready, methods=["PUT"], openapi_extra=_JSON)
        add("/v1/instruction", self.instruction, methods=["GET"])
        add("/v1/rounds/{round}/stage", self.pull, methods=["GET"], response_model=None)
        add("/v1/rounds/{round}/update", self.push, methods=["PUT"], openapi_extra=_TENSORS)
        add("/v1/progress", self.progress, methods=["POST"], status_code=204, openapi_extra=_JSON)
        add("/v1/alive", self.alive, methods=["POST"], status_code=204)
        add("/v1/failure", self.failure, methods=["POST"], status_code=204, openapi_extra=_JSON)
        add("/v1/address", self.publish_address, methods=["PUT"], status_code=204, openapi_extra=_JSON)
        add("/v1/address", self.address, methods=["GET"])
        return app

    async def health(self) -> dict[str, str]:
        """Whether the service answers at all."""
        return {"status": "ok"}

    async def readiness(self) -> JSONResponse:
        """Whether a round is open, and how it stands."""
        status = self._board.status()
        return JSONResponse(
            {
                "round": status.round,
                "state": {"train": "open", "wait": "between rounds"}.get(status.kind, "over"),
                "clients": len(status.cohort),
                "reported": status.num_reported,
            },
            status_code=200 if status.kind == "train" else 503,
        )

    async def prometheus(self, request: Request) -> Response:
        """Counts and state, for Prometheus.

        Raises:
            RefusedError: another machine asks, and may not.
        """
        peer = request.client.host if request.client else ""
        if not self._open_metrics and peer not in ("127.0.0.1", "::1"):
            raise RefusedError("metrics are for this machine alone", status=403, reason="forbidden")
        content, media_type = self.metrics.render()
        return Response(content, headers={"content-type": media_type})

    async def job(self, request: Request) -> JobOffer:
        """The job, as the asking device needs to know it.

        Raises:
            RefusedError: nobody that is known asks, or there is no job now.
        """
        member = self._member(request, any_plan=True)
        assert self._offer is not None
        if self._board.status().kind in ("stop", "next"):
            raise RefusedError("this job is over; the next has not come yet", status=503, reason="not-yet")
        return self._offer(member)

    async def ready(self, request: Request) -> Joined:
        """Note that a device can begin, and what it holds.

        Raises:
            RefusedError: it speaks of another job or plan, or its client's devices disagree.
        """
        member = self._member(request, any_plan=True)
        message = await read_message(request, Ready, self._limits)
        assert self._offer is not None
        if message.job != self._offer(member).job:
            raise RefusedError("that is not the job that is offered here", status=409, reason="wrong-job")
        return Joined(num_samples=self._board.join(member, message))

    async def instruction(
        self, request: Request, process: Annotated[str, Query(max_length=64)] = ""
    ) -> Instruction:
        """What the asking device should do now; held back while that is to wait."""
        self._member(request, any_plan=True)

        def look() -> Instruction:
            # the device may have another part by now, if its client was planned anew
            return self._board.instruction_for(self._who(request), process)

        return await self._hold(look, lambda found: found.kind != "wait", self._limits.long_poll_s)

    async def pull(self, request: Request, round: int, whole: bool = False, held: int = 0) -> FileResponse:
        """The round's global stages of the asking device; takes up again where a `range` header says.

        Where stages travel as differences, a device that holds those of the round before is sent no more than that.

        Raises:
            RefusedError: the round is not open, the device has no part in it, or the disk is full.
        """
        member = self._member(request)
        self._check_round(round, member)
        try:
            async with self._writing:
                path = await run_in_threadpool(
                    self._journal.global_stage,
                    member.pulled_in(round, whole=whole),
                    self._model.handed_out,
                    f"{member.stage_key}-whole" if whole else member.stage_key,
                    client=member.client,
                    compressed=CONTENT_ENCODING in request.headers.get("accept-encoding", ""),
                    difference=self._model.difference(round, held),
                )
            num_bytes = path.stat().st_size
        except OSError as error:
            self._check_round(round, member)  # it may have closed, and its folder be gone
            raise _full(error) from error
        self._board.sent(num_bytes)
        headers = {"content-encoding": CONTENT_ENCODING} if path.suffix == ".zst" else {}
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    async def push(self, request: Request, round: int) -> Receipt:
        """Take the asking device's update into the journal.

        Raises:
            RefusedError: it is not for now, not this device's, or not sound; nothing of it stays.
        """
        member = self._member(request)
        self._check_round(round, member)
        is_packed = content_encoding(request) == CONTENT_ENCODING
        parts = [self._journal.temporary(member.client, member.rank)]
        try:
            num_bytes = await stream_to_file(
                request, parts[0], max_bytes=member.max_update_bytes, limits=self._limits
            )
            async with self._taking[member]:  # a retry may arrive beside the upload that it repeats
                if is_packed:
                    parts.append(await self._unpack(parts[0], member))
                await self._take(parts[-1], member, round, num_bytes)
        except OSError as error:
            self._check_round(round, member)  # it may have closed, and its folder be gone
            raise _full(error) from error
        finally:
            for part in parts:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
        return Receipt(round=round, num_bytes=num_bytes)

    async def _unpack(self, part: Path, member: Member) -> Path:
        async with self._checking:
            return await run_in_threadpool(
                self._journal.unpack, part, member.client, member.rank, max_bytes=member.max_update_bytes
            )

    async def _take(self, part: Path, member: Member, round: int, num_bytes: int) -> None:
        self._check_round(round, member)
        if self._journal.has(member.client, member.rank):
            if await run_in_threadpool(self._journal.holds_same, part, member.client, member.rank):
                return
            raise RefusedError(
                f"another update of {member.client}/{member.device} for round {round} is in the journal already",
                status=409,
                reason="duplicate",
            )
        async with self._checking:
            address = self._board.address_of(member.client)
            report = await run_in_threadpool(
                self._journal.accept,
                part,
                member.client,
                member.rank,
                member.pushed_in(round),
                generation=address.generation if address else "",
            )
        if not self._board.reported(member, round, num_bytes, report.generation):
            self._journal.discard(member.client, member.rank, part=part)
            self._check_round(round, member)
            raise RefusedError(
                "the client's pipeline came up anew while this update was checked",
                status=409,
                reason="wrong-generation",
            )

    # messages are read by hand, after the credential is known and never more than a message may have

    async def progress(self, request: Request) -> None:
        """Note how far a client is; refused if its round is over, so that it need not finish in vain."""
        member = self._member(request)
        report = await read_message(request, ProgressReport, self._limits)
        if self._board.window(report.round, member.client) in ("over", "not in cohort"):
            self._check_round(report.round, member)  # one that is yet to open may have been begun ahead
        self._board.progressed(member, report)

    async def alive(self, request: Request) -> None:
        """Note that a device is not hanging."""
        self._member(request, any_plan=True)

    async def failure(self, request: Request) -> None:
        """Note that a device cannot go on."""
        member = self._member(request)
        self._board.failed(member, await read_message(request, FailureReport, self._limits))

    async def publish_address(self, request: Request) -> None:
        """Note where a client's first device listens.

        Raises:
            RefusedError: another device asks.
        """
        member = self._member(request)
        address = await read_message(request, Address, self._limits)
        if member.rank != 0:
            raise RefusedError(
                "only a client's first device publishes an address", status=403, reason="forbidden"
            )
        for rank in self._board.publish_address(member, address):
            self._journal.discard(member.client, rank)

    async def address(
        self,
        request: Request,
        generation: Annotated[int, Query(ge=0)] = 0,
        wait_s: Annotated[float, Query(ge=0)] = 0.0,
    ) -> Address | None:
        """Where the asking device's first device listens, held back until it does so for this generation.

        Null if not known yet.
        """
        client = self._member(request).client
        return await self._hold(
            lambda: self._board.address_of(client),
            lambda found: found is not None and found.number >= generation,
            min(wait_s, self._limits.long_poll_s),
        )

    async def _hold(
        self, look: Callable[[], _News], is_worth_it: Callable[[_News], bool], wait_s: float
    ) -> _News:
        """Hold an answer back until there is one that is worth it, or for so long."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + wait_s
        while True:
            news = asyncio.Event()
            self._waiting.add(news)
            try:
                found = look()
                if is_worth_it(found) or loop.time() >= deadline_s or self._is_closing:
                    return found
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), deadline_s - loop.time())
            finally:
                self._waiting.discard(news)

    def _member(self, request: Request, *, any_plan: bool = False) -> Member:
        """Who asks.

        Raises:
            RefusedError: nobody that is known, or one that holds stages of a plan that is no more.
        """
        member = self._who(request)
        self._board.heard(member)
        held = request.headers.get("fedmp-plan", "")
        if held and member.plan and held != member.plan and not any_plan:
            raise RefusedError(
                f"the model of {member.client} was cut anew; ask for the job again",
                status=409,
                reason="other-plan",
            )
        return member

    def _who(self, request: Request) -> Member:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise RefusedError("unknown credential", status=401, reason="unknown-credential")
        member = self._identify(token)
        request.state.member = member
        return member

    def _check_round(self, round: int, member: Member) -> None:
        """Refuse what is not for the open round, by a client of its cohort."""
        window, status = self._board.window(round, member.client), self._board.status()
        if window == "not yet":
            raise RefusedError(f"round {round} is not open yet", status=503, reason="not-yet")
        if window == "over":
            opened = f"; round {status.round} is open" if status.kind == "train" else ""
            raise RefusedError(f"round {round} is over{opened}", status=409, reason="wrong-round")
        if window == "never":
            raise RefusedError(
                f"round {round} is not open; round {status.round} is", status=409, reason="wrong-round"
            )
        if window == "not in cohort":
            raise RefusedError(
                f"client {member.client} is not in the cohort of round {round}",
                status=409,
                reason="not-in-cohort",
            )

    def _wake(self) -> None:
        def set_all() -> None:
            for event in list(self._waiting):
                event.set()

        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(set_all)

    async def _refuse(self, request: Request, error: Exception) -> JSONResponse:
        status, reason, detail = _explain(error)
        member: Member | None = getattr(request.state, "member", None)
        route = getattr(request.scope.get("route"), "path", "")
        self.metrics.refused(reason)
        _log.warning(
            "refused: %s",
            detail,
            extra={
                "fields": {
                    "event": "refused",
                    "reason": reason,
                    "status": status,
                    "method": request.method,
                    "route": route,
                    "client": member.client if member else None,
                    "device": member.device if member else None,
                    "peer": request.client.host if request.client else None,
                }
            },
        )
        headers = {"retry-after": str(_SOON_S)} if status == 503 else {}
        if status in (408, 413):
            headers["connection"] = "close"  # such a body may never end
        return JSONResponse({"detail": detail, "reason": reason}, status_code=status, headers=headers)

    def _note_cut(self, reason: str, peer: str) -> None:
        self.metrics.refused(reason)
        _log.warning(
            "connection cut: %s", reason, extra={"fields": {"event": "cut", "reason": reason, "peer": peer}}
        )


_TENSORS = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_JSON = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}


def _full(error: OSError) -> RefusedError:
    return RefusedError(
        f"the coordinator cannot write its journal: {error.strerror}", status=507, reason="disk"
    )


def _explain(error: Exception) -> tuple[int, str, str]:
    """Status, reason and sentence of a refusal."""
    if isinstance(error, RefusedError):
        return error.status, error.reason, str(error)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return 422, "malformed", f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    assert isinstance(error, HTTPException)
    return error.status_code, "no-such-thing", str(error.detail)


def _by_token(board: Board) -> Callable[[str], Member]:
    """The board's members by the hash of their credential."""
    known: Mapping[str, Member] = {}
    by_digest: dict[bytes, Member] = {}

    def identify(token: str) -> Member:
        nonlocal known, by_digest
        if board.members is not known:
            known = board.members
            by_digest = {_digest(token): member for token, member in known.items()}
        member = by_digest.get(_digest(token))
        if member is None:
            raise RefusedError("unknown credential", status=401, reason="unknown-credential")
        return member

    return identify


def _digest(token: str) -> bytes:
    # looking up a keyed digest instead of the token itself takes the same time for near misses
    return hmac.digest(b"fedmp", token.encode(), hashlib.sha256)
