"""A coordinator's real service with two made-up clients, and raw requests to it."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import save

from fedmp.coordinator import Board, CoordinatorService, GlobalModel, Journal, Limits, Member
from fedmp.graph import StateSpec
from fedmp.records import DeviceReport

SHAPES = {"a.weight": (3, 2), "a.mean": (3,), "b.weight": (2,), "b.count": ()}


def specs() -> dict[str, StateSpec]:
    """A model of two stages: a weight and a running mean, a weight and a counter."""

    def spec(name: str) -> StateSpec:
        return StateSpec(
            name=name,
            aliases=(name,),
            is_persistent=True,
            kind="parameter" if name.endswith("weight") else "buffer",
            shape=SHAPES[name],
            dtype=torch.int64 if name == "b.count" else torch.float32,
            requires_grad=name.endswith("weight"),
        )

    return {name: spec(name) for name in SHAPES}


STAGES = (("a.weight", "a.mean"), ("b.weight", "b.count"))


def members() -> dict[str, Member]:
    """Clients `ann` and `bob`, each with a device for either stage; the credential is client and stage."""
    return {
        f"{client}{stage}": Member(
            client=client,
            device=f"d{stage}",
            rank=stage,
            stages=(stage,),
            pulled=names,
            pushed=names,
            stage_key=f"stage{stage}",
            max_update_bytes=4096,
        )
        for client in ("ann", "bob")
        for stage, names in enumerate(STAGES)
    }


def state() -> dict[str, torch.Tensor]:
    """The global model: every value its place in the order of `SHAPES`."""
    return {
        name: torch.full(spec.shape, float(index)).to(spec.dtype)
        for index, (name, spec) in enumerate(specs().items())
    }


def update(stage: int, value: float = 1.0) -> dict[str, torch.Tensor]:
    """A valid update of a stage."""
    return {
        name: torch.full(SHAPES[name], value).to(torch.int64 if name == "b.count" else torch.float32)
        for name in STAGES[stage]
    }


def body(tensors: Mapping[str, torch.Tensor], report: DeviceReport | str | None = None) -> bytes:
    """An update as it travels."""
    if report is None:
        report = DeviceReport(num_examples=10)
    text = report if isinstance(report, str) else report.model_dump_json()
    return save(dict(tensors), metadata={"report": text})


def digest_of(payload: bytes) -> str:
    """The header that announces a body's digest."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(payload).digest()).decode()}:"


@dataclass
class Coordinator:
    """The parts of a running coordinator."""

    board: Board
    journal: Journal
    model: GlobalModel
    folder: Path
    service: CoordinatorService

    def ask(
        self, method: str, path: str, token: str = "", payload: Any = None, **headers: str
    ) -> tuple[int, bytes]:
        """Send one request on a connection of its own; returns status and body."""
        address = urlsplit(self.service.url)
        assert address.hostname is not None
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
        if token:
            headers["authorization"] = f"Bearer {token}"
        try:
            connection.request(method, path, payload, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def push(self, token: str, payload: Any, round: int = 1) -> tuple[int, str]:
        """Push an update; returns status and what the coordinator says."""
        status, answer = self.ask(
            "PUT", f"/v1/rounds/{round}/update", token, payload, **{"content-digest": digest_of(payload)}
        )
        return status, json.loads(answer).get("detail", "")

    def files(self) -> list[str]:
        """What the journal holds, hidden files too."""
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())


@contextmanager
def coordinator(folder: Path, limits: Limits | None = None, **options: Any) -> Iterator[Coordinator]:
    """A coordinator whose first round is open for `ann` and `bob`."""
    board, journal = Board(members()), Journal(folder, specs())
    model = GlobalModel(specs(), state())
    journal.open(1)
    board.open_round(1, ("ann", "bob"))
    with CoordinatorService(board, journal, model, limits=limits, **options) as service:
        yield Coordinator(board, journal, model, folder, service)
