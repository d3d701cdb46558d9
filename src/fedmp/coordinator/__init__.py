"""The coordinator: hands out global stages, journals updates, aggregates, and keeps the global model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedmp.coordinator.board import Board
from fedmp.coordinator.checkpoint import Checkpoint, CheckpointStore
from fedmp.coordinator.clients import Clients, ClientUpdate, Opening, Trained
from fedmp.coordinator.global_model import GlobalModel
from fedmp.coordinator.journal import Journal
from fedmp.coordinator.members import Member
from fedmp.coordinator.remote import RemoteClients
from fedmp.coordinator.roster import Roster, Standing
from fedmp.coordinator.rounds import RoundSettings, run_rounds

if TYPE_CHECKING:
    from fedmp.coordinator.guard import Limits
    from fedmp.coordinator.server import Tls, check_address
    from fedmp.coordinator.service import CoordinatorService

__all__ = [
    "Board",
    "Checkpoint",
    "CheckpointStore",
    "ClientUpdate",
    "Clients",
    "CoordinatorService",
    "GlobalModel",
    "Journal",
    "Limits",
    "Member",
    "Opening",
    "RemoteClients",
    "Roster",
    "RoundSettings",
    "Standing",
    "Tls",
    "Trained",
    "check_address",
    "run_rounds",
]

# these import the web server, which a simulation does without
_SERVED = {"Limits": "guard", "Tls": "server", "check_address": "server", "CoordinatorService": "service"}


def __getattr__(name: str) -> Any:
    if name in _SERVED:
        return getattr(importlib.import_module(f"{__name__}.{_SERVED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
