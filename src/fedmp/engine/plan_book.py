"""The clients' plans as they are now, on disk: a coordinator that is started anew goes on with them.

A plan is written down before any device is told of it. What the journal holds of the open round was made by the
plan that is written here, or does not fit it and is made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmp.engine.client_plan import cut_by
from fedmp.engine.prepare import Prepared
from fedmp.engine.setup import ClientSetup
from fedmp.errors import PlanError
from fedmp.records import Plan

__all__ = ["PlanBook"]


class PlanBook:
    """The file of the plans that are not the first ones.

    Args:
        path: of the file; there is none while every client has its first plan.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, prepared: Prepared) -> dict[str, ClientSetup]:
        """Each client as it was cut last; what does not fit the job any more is passed over."""
        try:
            book = _Book.model_validate_json(self._path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return {}
        setups = {}
        for name, entry in book.clients.items():
            whole = prepared.clients.get(name)
            if whole is None or not _fits(entry, whole, prepared):
                continue
            devices = [device for device in whole.client.devices if device.name in entry.devices]
            try:
                setups[name] = cut_by(prepared, whole, entry.plan, devices)
            except PlanError:
                continue
        return setups

    def write(self, setups: Mapping[str, ClientSetup]) -> None:
        """Keep these, and no others.

        Args:
            setups: clients that are not cut by their first plan, by name.
        """
        clients = {
            name: _Entry(devices=tuple(d.name for d in setup.client.devices), plan=setup.plan)
            for name, setup in setups.items()
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f".{self._path.name}.part")
        with part.open("w") as file:
            json.dump(_Book(clients=clients).model_dump(mode="json"), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)


class _Entry(BaseModel):
    """A client: the devices that were there when it was planned, and its plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: tuple[str, ...]
    plan: Plan


class _Book(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    clients: Mapping[str, _Entry]


def _fits(entry: _Entry, whole: ClientSetup, prepared: Prepared) -> bool:
    known = {device.name for device in whole.client.devices}
    return (
        known >= {*entry.devices, *entry.plan.devices}
        and entry.plan.fingerprint == whole.plan.fingerprint
        and entry.plan.layer_names == whole.plan.layer_names
    )
