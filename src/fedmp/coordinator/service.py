"""The coordinator's HTTP service: devices dial in, pull their stage, push their update.

Control messages are validated JSON, tensors are safetensors files, streamed from and to disk. A request
is answered on the spot or, where a device asks what to do next, held back until there is news.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import socket
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from fedmp.coordinator.board import Board, Member
from fedmp.coordinator.global_model import GlobalModel
from fedmp.coordinator.journal import Journal
from fedmp.errors import ConfigError, RefusedError
from fedmp.records import Address, FailureReport, Instruction, ProgressReport, Receipt

__all__ = ["CoordinatorService", "check_address"]

_LONG_POLL_S = 10.0
_MAX_MESSAGE_BYTES = 1 << 20

Message = TypeVar("Message", bound=BaseModel)


class CoordinatorService:
    """Serves one job. Use it as a context manager.

    Args:
        board, journal, model: shared with the round loop.
        host, port: where to listen; port 0 picks a free one.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(
        self, board: Board, journal: Journal, model: GlobalModel, *, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self._board = board
        self._journal = journal
        self._model = model
        self._digests = {_digest(token): member for token, member in board.members.items()}
        self._waiting: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writing = asyncio.Lock()
        self._taking: defaultdict[Member, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._socket = _listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self.app = self._make_app()
        config = uvicorn.Config(
            self.app, log_level="error", access_log=False, lifespan="on", timeout_graceful_shutdown=2
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="fedmp-coordinator", daemon=True)

    def __enter__(self) -> CoordinatorService:
        self._ready = threading.Event()
        self._thread.start()
        if not self._ready.wait(30):
            self.__exit__()
            raise ConfigError(f"the coordinator's service did not come up on {self.url}")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])

    def _make_app(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            self._loop = asyncio.get_running_loop()
            self._board.listen(self._wake)
            self._ready.set()
            yield

        app = FastAPI(title="fedmp coordinator", lifespan=lifespan)
        app.add_exception_handler(RefusedError, _refuse)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/v1/instruction", self.instruction, methods=["GET"])
        app.add_api_route("/v1/rounds/{round}/stage", self.pull, methods=["GET"], response_model=None)
        app.add_api_route("/v1/rounds/{round}/update", self.push, methods=["PUT"])
        app.add_api_route("/v1/progress", self.progress, methods=["POST"], status_code=204)
        app.add_api_route("/v1/failure", self.failure, methods=["POST"], status_code=204)
        app.add_api_route("/v1/address", self.publish_address, methods=["PUT"], status_code=204)
        app.add_api_route("/v1/address", self.address, methods=["GET"])
        return app

    async def health(self) -> dict[str, str]:
        """Whether the service answers at all."""
        return {"status": "ok"}

    async def instruction(self, request: Request) -> Instruction:
        """What the asking device should do now; held back while that is to wait."""
        member = self._member(request)
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _LONG_POLL_S
        while True:
            news = asyncio.Event()
            self._waiting.add(news)
            try:
                instruction = self._board.instruction_for(member)
                if instruction.kind != "wait" or loop.time() >= deadline_s:
                    return instruction
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), deadline_s - loop.time())
            finally:
                self._waiting.discard(news)

    async def pull(self, request: Request, round: int) -> FileResponse:
        """The round's global stages of the asking device."""
        member = self._member(request)
        self._check_round(round)
        async with self._writing:
            path = await run_in_threadpool(
                self._journal.global_stage, member.pulled, self._model.state, member.stage_key
            )
        self._board.sent(path.stat().st_size)
        return FileResponse(path, media_type="application/octet-stream")

    async def push(self, request: Request, round: int) -> Receipt:
        """Take the asking device's update into the journal."""
        member = self._member(request)
        self._check_round(round)
        if not self._board.takes_part(member):
            raise RefusedError(f"client {member.client} is not in the cohort of round {round}", status=409)
        part = self._journal.temporary(member.client, member.rank)
        try:
            num_bytes = await _stream_to_file(request, part, member.max_update_bytes)
            async with self._taking[member]:  # a retry may arrive beside the upload that it repeats
                self._check_round(round)
                if not self._journal.has(member.client, member.rank):
                    await run_in_threadpool(
                        self._journal.accept, part, member.client, member.rank, member.pushed
                    )
                    self._board.reported(member, num_bytes)
        finally:
            part.unlink(missing_ok=True)
        return Receipt(round=round, num_bytes=num_bytes)

    # messages are read by hand, after the credential is known and never more than a message may have

    async def progress(self, request: Request) -> None:
        """Note how far a client is."""
        member = self._member(request)
        self._board.progressed(member, await _read_message(request, ProgressReport))

    async def failure(self, request: Request) -> None:
        """Note that a device cannot go on."""
        self._member(request)
        self._board.failed(await _read_message(request, FailureReport))

    async def publish_address(self, request: Request) -> None:
        """Note where a client's first device listens."""
        member = self._member(request)
        address = await _read_message(request, Address)
        if member.rank != 0:
            raise RefusedError("only a client's first device publishes an address", status=403)
        self._board.publish_address(member, address)

    async def address(self, request: Request) -> Address | None:
        """Where the asking device's first device listens; null if not known yet."""
        return self._board.address_of(self._member(request).client)

    def _member(self, request: Request) -> Member:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        member = self._digests.get(_digest(token)) if scheme.lower() == "bearer" else None
        if member is None:
            raise RefusedError("unknown credential", status=401)
        self._board.heard(member)
        return member

    def _check_round(self, round: int) -> None:
        open_round = self._journal.round
        if round != open_round or not open_round:
            instead = f"round {open_round} is" if open_round else "none is"
            raise RefusedError(f"round {round} is not open; {instead}", status=409)

    def _wake(self) -> None:
        def set_all() -> None:
            for event in list(self._waiting):
                event.set()

        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(set_all)


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError)
    return JSONResponse({"detail": str(error)}, status_code=error.status)


async def _stream_to_file(request: Request, path: Path, max_bytes: int) -> int:
    """Stream a body to disk; refuses one that is longer than it may be, before or while it comes."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise RefusedError(f"the body has {announced} bytes, at most {max_bytes} are allowed", status=413)
    num_bytes = 0
    try:
        with path.open("wb") as file:
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise RefusedError(f"the body has more than {max_bytes} bytes", status=413)
                file.write(chunk)
    except ClientDisconnect:
        raise RefusedError(f"the body broke off after {num_bytes} bytes", status=400) from None
    return num_bytes


async def _read_message(request: Request, kind: type[Message]) -> Message:
    """A small JSON body as a validated message."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_MESSAGE_BYTES:
                raise RefusedError(f"a message has at most {_MAX_MESSAGE_BYTES} bytes", status=413)
        return kind.model_validate_json(body)
    except ClientDisconnect:
        raise RefusedError("the message broke off", status=400) from None
    except ValidationError as error:
        raise RefusedError(f"not a valid {kind.__name__}: {error.errors()[0]['msg']}", status=422) from error


def check_address(host: str, port: int) -> None:
    """Find out early whether a service could listen here.

    Raises:
        ConfigError: it could not.
    """
    _listen(host, port).close()


def _digest(token: str) -> bytes:
    # looking up a keyed digest instead of the token itself takes the same time for near misses
    return hmac.digest(b"fedmp", token.encode(), hashlib.sha256)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the coordinator cannot listen on {host}:{port}: {error.strerror}; choose another with "
            f"engine.port=NUMBER, or engine.port=0 for a free one"
        ) from error
    return listener
