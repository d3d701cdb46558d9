"""Updates of simulated clients that are late: held until they arrive, and kept with the run for a resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fedmp.coordinator import ClientUpdate
from fedmp.errors import ResumeError
from fedmp.records import DeviceReport

__all__ = ["Held", "HeldUpdates"]


@dataclass(frozen=True)
class Held:
    """A late client's update.

    Attributes:
        update: made already, from the model that the client began with.
        left_s: simulated seconds after the present round until it arrives.
        num_bytes: that it takes then.
    """

    update: ClientUpdate
    left_s: float
    num_bytes: int = 0


class HeldUpdates:
    """Late updates in a folder. What a round leaves is written before the round is committed.

    Args:
        folder: made when the first update is late.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, round: int, held: Mapping[str, Held]) -> None:
        """Keep what is late as a round closes."""
        if not held and not self._folder.exists():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for client, late in held.items():
            path = self._path(client, late.update.round)
            if not path.exists():
                reports = json.dumps([report.model_dump(mode="json") for report in late.update.reports])
                tensors = {name: tensor.contiguous() for name, tensor in late.update.items()}
                part = path.with_name(f".{path.name}.part")
                save_file(tensors, part, metadata={"reports": reports})
                part.replace(path)
        rows = {client: [late.update.round, late.left_s, late.num_bytes] for client, late in held.items()}
        part = self._list(round).with_suffix(".part")
        part.write_text(json.dumps(rows))
        part.replace(self._list(round))

    def load(self, round: int, late: Mapping[str, int]) -> dict[str, Held]:
        """What a committed round left.

        Args:
            round: its number.
            late: clients that were late, by the round that they began with.

        Raises:
            ResumeError: it is not here.
        """
        if not late:
            return {}
        try:
            rows = json.loads(self._list(round).read_text())
            return {
                client: Held(self._read(client, begun), *rows[client][1:]) for client, begun in late.items()
            }
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ResumeError(
                f"the updates that were late in round {round} ({', '.join(late)}) cannot be read from "
                f"{self._folder}: {error}"
            ) from error

    def committed(self, round: int, held: Mapping[str, Held]) -> None:
        """Delete what a committed round has taken."""
        if not self._folder.exists():
            return
        needed = {self._path(client, late.update.round) for client, late in held.items()}
        for path in self._folder.iterdir():
            if path not in needed and path != self._list(round):
                path.unlink()

    def _read(self, client: str, begun: int) -> ClientUpdate:
        path = self._path(client, begun)
        with safe_open(path, framework="pt") as body:
            rows = json.loads((body.metadata() or {})["reports"])
        reports = tuple(DeviceReport.model_validate(row) for row in rows)
        return ClientUpdate(client, begun, load_file(path), reports)

    def _path(self, client: str, begun: int) -> Path:
        return self._folder / f"{client}.{begun}.safetensors"

    def _list(self, round: int) -> Path:
        return self._folder / f"round-{round:05d}.json"
