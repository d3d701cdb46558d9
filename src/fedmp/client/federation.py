"""The device's side of the federation plane: a small interface, and HTTP as its carrier."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import logging
import ssl
import time
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlencode

import torch
import urllib3
from pydantic import BaseModel, ValidationError

from fedmp.client.body import read_body, update_body
from fedmp.errors import FederationError, RefusedError
from fedmp.records import (
    Address,
    DeviceReport,
    FailureReport,
    Instruction,
    JobOffer,
    Joined,
    ProgressReport,
    Ready,
)
from fedmp.updates import CONTENT_ENCODING, Zstd

__all__ = ["OTHER_PLAN", "Federation", "HttpFederation"]

_CONNECT_S = 10.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_PIECE_BYTES = 1 << 20
_PARTIAL = 206
_MAX_STAGE_BYTES = 1 << 40
# too slow, broken, not open yet, a full disk, a proxy that lost its server: what a restart or a moment may mend
_WORTH_ANOTHER_TRY = (408, 500, 502, 503, 504, 507)
_DAMAGED = ("tampered", "broken-off")

OTHER_PLAN = "other-plan"  # why what assumes a plan that is no more is refused
ROUND_IS_OVER = 409  # what is refused so is for a round, or a plan, that is no more

_log = logging.getLogger("fedmp.device")


class Federation(Protocol):
    """What a device asks of the coordinator, over whatever carrier."""

    def job(self) -> JobOffer:
        """The job that the coordinator offers; waits for one."""
        ...

    def holds(self, plan: str) -> None:
        """From now on this device holds stages of this plan; requests that assume another one are refused."""
        ...

    def ready(self, message: Ready) -> Joined:
        """Say that this device can begin."""
        ...

    def instruction(self, process: str = "") -> Instruction:
        """What to do next; may take a while to answer. A device that was started anew names another process."""
        ...

    def pull(
        self, round: int, *, whole: bool = False, held: int = 0, max_bytes: int
    ) -> dict[str, torch.Tensor]:
        """The round's global stage as it travels, by the names in its payload.

        Args:
            round: the open one.
            max_bytes: that it may have once it is decompressed.
            whole: also what does not travel in every round, for a client that has no values of its own.
            held: the round whose stages this device still has, to which differences may be sent; 0 for none.
        """
        ...

    def push(
        self,
        round: int,
        payload: Mapping[str, torch.Tensor],
        report: DeviceReport,
        *,
        zstd: Zstd | None = None,
    ) -> None:
        """Hand in the round's update as it travels, compressed where that is worth it; returns once it is safe."""
        ...

    def progress(self, report: ProgressReport) -> bool:
        """Say how far this client is; may be lost.

        Returns:
            Whether to go on: False if the update can count no more.
        """
        ...

    def beat(self) -> None:
        """Say that this device is alive; may be lost."""
        ...

    def fail(self, report: FailureReport) -> None:
        """Say that this device cannot go on."""
        ...

    def publish_address(self, address: Address) -> None:
        """Say where the client's other devices find this one."""
        ...

    def address(self, generation: int = 0, *, wait_s: float = 0.0) -> Address | None:
        """Where the client's first device listens.

        Args:
            generation: of the pipeline that is wanted, at least.
            wait_s: how long the answer may be held back until that is known.

        Returns:
            The newest address; None if none is known yet.
        """
        ...


class HttpFederation:
    """Dials the coordinator's HTTP service; carries on by itself while it is away.

    Args:
        url: of the coordinator.
        token: this device's credential.
        context: for TLS; None trusts the authorities that the system trusts.
        timeout_s: without a byte, after which an attempt is given up.
        patience_s: without an answer, after which the coordinator is given up.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        context: ssl.SSLContext | None = None,
        timeout_s: float = 60.0,
        patience_s: float = 30.0,
    ) -> None:
        self._url = url.rstrip("/")
        self._patience_s = patience_s
        self._headers = {"authorization": f"Bearer {token}"}
        self._pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=min(timeout_s, _CONNECT_S), read=timeout_s),
            retries=False,
            ssl_context=context,
        )

    def holds(self, plan: str) -> None:
        """Say with every request of which plan this device holds stages."""
        self._headers["fedmp-plan"] = plan

    def job(self) -> JobOffer:
        """The job that the coordinator offers; it may not have one yet."""
        return JobOffer.model_validate_json(self._ask("GET", "/v1/job").data)

    def ready(self, message: Ready) -> Joined:
        """Say that this device can begin."""
        return Joined.model_validate_json(self._send("PUT", "/v1/ready", message))

    def instruction(self, process: str = "") -> Instruction:
        """What to do next; the coordinator answers at once or within its long-poll time."""
        fields = {"process": process} if process else None
        return Instruction.model_validate_json(self._ask("GET", "/v1/instruction", fields=fields).data)

    def pull(
        self, round: int, *, whole: bool = False, held: int = 0, max_bytes: int = _MAX_STAGE_BYTES
    ) -> dict[str, torch.Tensor]:
        """The round's global stages; a transfer that breaks off is taken up again where it did.

        Raises:
            RefusedError: the round is over, or not this client's.
            FederationError: nothing came for `patience_s`, or what came is not what it claims to be.
        """
        asked = {"whole": "true"} if whole else {}
        asked |= {"held": str(held)} if held else {}
        path = f"/v1/rounds/{round}/stage" + (f"?{urlencode(asked)}" if asked else "")
        received = _Received()
        progress_s = time.monotonic()
        while not received.is_whole:
            before = received.num_bytes
            response = self._ask("GET", path, headers=received.headers(), preload_content=False)
            try:
                received.take(response)
            except urllib3.exceptions.HTTPError as error:
                if received.num_bytes > before:
                    progress_s = time.monotonic()
                elif time.monotonic() - progress_s > self._patience_s:
                    raise self._silence(error) from error
                _log.info("a transfer broke off after %d bytes: %s", received.num_bytes, error)
                time.sleep(_FIRST_PAUSE_S)
            finally:
                response.close()
        return read_body(received.body(), is_compressed=received.is_compressed, max_bytes=max_bytes)

    def push(
        self,
        round: int,
        payload: Mapping[str, torch.Tensor],
        report: DeviceReport,
        *,
        zstd: Zstd | None = None,
    ) -> None:
        """Hand in the round's update, with its report in the file's metadata.

        Sent again until it is acknowledged; the coordinator knows what it has already.
        """
        body = update_body(payload, report, zstd)
        digest = base64.b64encode(hashlib.sha256(body.content).digest()).decode()
        headers = {"content-digest": f"sha-256=:{digest}:"}
        if body.is_compressed:
            headers["content-encoding"] = CONTENT_ENCODING
        self._ask("PUT", f"/v1/rounds/{round}/update", body=body.content, headers=headers)

    def progress(self, report: ProgressReport) -> bool:
        """Say how far this client is; not worth a second attempt. False if the round is over for it."""
        try:
            self._send("POST", "/v1/progress", report, patience_s=0.0)
        except RefusedError as error:
            return error.status != ROUND_IS_OVER
        except FederationError:
            pass
        return True

    def beat(self) -> None:
        """Say that this device is alive; the next one will do if this one is lost."""
        with contextlib.suppress(FederationError):
            self._ask("POST", "/v1/alive", patience_s=0.0)

    def fail(self, report: FailureReport) -> None:
        """Say that this device cannot go on."""
        self._send("POST", "/v1/failure", report)

    def publish_address(self, address: Address) -> None:
        """Say where the client's other devices find this one."""
        self._send("PUT", "/v1/address", address)

    def address(self, generation: int = 0, *, wait_s: float = 0.0) -> Address | None:
        """Where the client's first device listens; the coordinator answers when it knows, or after `wait_s`."""
        fields = {"generation": str(generation), "wait_s": str(wait_s)} if wait_s else None
        data = self._ask("GET", "/v1/address", fields=fields).data
        return None if data == b"null" else Address.model_validate_json(data)

    def _send(self, method: str, path: str, message: BaseModel, **options: Any) -> bytes:
        headers = {"content-type": "application/json"}
        body = message.model_dump_json().encode()
        return self._ask(method, path, body=body, headers=headers, **options).data

    def _ask(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        patience_s: float | None = None,
        **options: Any,
    ) -> urllib3.BaseHTTPResponse:
        """Ask until there is an answer: every request is idempotent.

        Raises:
            RefusedError: the answer is no.
            FederationError: there was none for `patience_s`, or it did not come from the coordinator.
        """
        deadline_s = time.monotonic() + (self._patience_s if patience_s is None else patience_s)
        headers = {**self._headers, **(headers or {})}
        for attempt in itertools.count():
            trouble: Exception
            try:
                response = self._pool.request(
                    method, self._url + path, headers=headers, redirect=False, **options
                )
                if response.status < 300:
                    return response
                trouble = refusal = _refusal(method, path, response)
                if response.status not in _WORTH_ANOTHER_TRY and refusal.reason not in _DAMAGED:
                    raise trouble
            except urllib3.exceptions.SSLError as error:
                raise FederationError(
                    f"no secure connection to the coordinator at {self._url}: {error}; the credentials hold the "
                    f"authority (ca) that this device trusts"
                ) from error
            except urllib3.exceptions.HTTPError as error:
                trouble = error
            if time.monotonic() >= deadline_s:
                if isinstance(trouble, RefusedError):
                    raise trouble
                raise self._silence(trouble) from trouble
            time.sleep(min(_FIRST_PAUSE_S * 2 ** min(attempt, 10), _LONGEST_PAUSE_S))
        raise AssertionError

    def _silence(self, error: Exception) -> FederationError:
        return FederationError(f"the coordinator at {self._url} does not answer: {error}")


class _Received:
    """A body as far as it has come."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._total: int | None = None
        self._tag = ""
        self.num_bytes = 0
        self.is_compressed = False

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there."""
        return self._total is not None and self.num_bytes == self._total

    def headers(self) -> dict[str, str]:
        """Ask for the rest, or for all of it if it has changed."""
        headers = {"accept-encoding": CONTENT_ENCODING}
        if self.num_bytes:
            headers |= {"range": f"bytes={self.num_bytes}-", "if-range": self._tag}
        return headers

    def take(self, response: urllib3.BaseHTTPResponse) -> None:
        """Read on."""
        if response.status != _PARTIAL:
            self._parts, self.num_bytes = [], 0
        self._tag = response.headers.get("etag", "")
        self.is_compressed = response.headers.get("content-encoding", "") == CONTENT_ENCODING
        self._total = self.num_bytes + int(response.headers["content-length"])
        while part := response.read1(_PIECE_BYTES, decode_content=False):
            self._parts.append(part)
            self.num_bytes += len(part)

    def body(self) -> bytes:
        """All of it; what was received is let go."""
        whole = b"".join(self._parts)
        self._parts = []
        return whole


def _refusal(method: str, path: str, response: urllib3.BaseHTTPResponse) -> RefusedError:
    text = response.data.decode(errors="replace")[:2000]
    try:
        answer = _Refusal.model_validate_json(text)
    except ValidationError:  # not the coordinator's own, but of a proxy before it
        answer = _Refusal(detail=text[:300], reason="invalid")
    return RefusedError(
        f"the coordinator refused {method} {path}: {answer.detail}",
        status=response.status,
        reason=answer.reason,
    )


class _Refusal(BaseModel):
    detail: str
    reason: str
