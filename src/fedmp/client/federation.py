"""The device's side of the federation plane: a small interface, and HTTP as its carrier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import urllib3
from pydantic import BaseModel
from safetensors.torch import load, save

from fedmp.errors import FederationError, RefusedError
from fedmp.records import Address, DeviceReport, FailureReport, Instruction, ProgressReport

__all__ = ["Federation", "HttpFederation"]


class Federation(Protocol):
    """What a device asks of the coordinator, over whatever carrier."""

    def instruction(self) -> Instruction:
        """What to do next; may take a while to answer."""
        ...

    def pull(self, round: int) -> dict[str, torch.Tensor]:
        """The round's global stage, by canonical name."""
        ...

    def push(self, round: int, update: Mapping[str, torch.Tensor], report: DeviceReport) -> None:
        """Hand in the round's update; returns once it is safe."""
        ...

    def progress(self, report: ProgressReport) -> None:
        """Say how far this client is; may be lost."""
        ...

    def fail(self, report: FailureReport) -> None:
        """Say that this device cannot go on."""
        ...

    def publish_address(self, address: Address) -> None:
        """Say where the client's other devices find this one."""
        ...

    def address(self) -> Address | None:
        """Where the client's first device listens; None if not known yet."""
        ...


class HttpFederation:
    """Dials the coordinator's HTTP service; retries while it is away.

    Args:
        url: of the coordinator.
        token: this device's credential.
        timeout_s: of one request.
        retries: attempts to connect, with growing pauses, before giving up.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 60.0, retries: int = 8) -> None:
        self._url = url.rstrip("/")
        self._pool = urllib3.PoolManager(
            headers={"authorization": f"Bearer {token}"},
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
            # every request is idempotent: a push that is already in the journal is acknowledged again
            retries=urllib3.Retry(total=retries, backoff_factor=0.1, allowed_methods=None, redirect=0),
        )

    def instruction(self) -> Instruction:
        """What to do next; the coordinator answers at once or within its long-poll time."""
        return Instruction.model_validate_json(self._ask("GET", "/v1/instruction").data)

    def pull(self, round: int) -> dict[str, torch.Tensor]:
        """The round's global stage."""
        return load(self._ask("GET", f"/v1/rounds/{round}/stage").data)

    def push(self, round: int, update: Mapping[str, torch.Tensor], report: DeviceReport) -> None:
        """Hand in the round's update, with its report in the file's metadata."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in update.items()}
        body = save(tensors, metadata={"report": report.model_dump_json()})
        self._ask("PUT", f"/v1/rounds/{round}/update", body=body)

    def progress(self, report: ProgressReport) -> None:
        """Say how far this client is."""
        self._send("POST", "/v1/progress", report)

    def fail(self, report: FailureReport) -> None:
        """Say that this device cannot go on."""
        self._send("POST", "/v1/failure", report)

    def publish_address(self, address: Address) -> None:
        """Say where the client's other devices find this one."""
        self._send("PUT", "/v1/address", address)

    def address(self) -> Address | None:
        """Where the client's first device listens."""
        data = self._ask("GET", "/v1/address").data
        return None if data == b"null" else Address.model_validate_json(data)

    def _send(self, method: str, path: str, message: BaseModel) -> None:
        headers = {**self._pool.headers, "content-type": "application/json"}
        self._ask(method, path, body=message.model_dump_json().encode(), headers=headers)

    def _ask(self, method: str, path: str, **options: Any) -> urllib3.BaseHTTPResponse:
        try:
            response = self._pool.request(method, self._url + path, **options)
        except urllib3.exceptions.HTTPError as error:
            raise FederationError(f"the coordinator at {self._url} does not answer: {error}") from error
        if response.status >= 400:
            raise RefusedError(
                f"the coordinator refused {method} {path}: {response.data.decode(errors='replace')[:500]}",
                status=response.status,
            )
        return response
