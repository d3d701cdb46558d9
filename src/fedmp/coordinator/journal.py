"""The journal of a round: every update is a checked safetensors file before it is acknowledged.

Uploads arrive in any order, one device at a time. A client counts once all of its devices' are there.
They are kept as they came, transformed, and the files are mapped, not read: a tensor is decoded when the
aggregator asks for it, so aggregation needs memory for about one.

A round's folder holds the updates that started from its model, whenever they arrive, and the stages that they
start from; it stays while a client that is late needs it. Which updates a round takes is written down before
they are combined, so that a coordinator that is killed then takes the same ones again.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedmp.coordinator.clients import ClientUpdate
from fedmp.coordinator.disk import disk_errors, flush, write_atomically
from fedmp.coordinator.estimates import EstimateBook, EstimateStore
from fedmp.coordinator.update_files import UpdateFiles, check_report
from fedmp.errors import RefusedError
from fedmp.graph import StateSpec
from fedmp.records import DeviceReport
from fedmp.updates import Channel, Decoded, PayloadError, decompress

__all__ = ["Journal"]

_PIECE = 1 << 16
_MODEL, _DECISION = "model.safetensors", "closed.json"


class Journal:
    """Updates of the open round, and the global stages that it started from.

    Args:
        folder: of the whole job's journal; a round's files lie in a folder of their own below it.
        specs: of every tensor of the model.
        uplink, downlink: how updates come in and global stages go out; None as they are.
        estimates: holds clients' updates, to which the next ones are told as differences; None if they are not.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, StateSpec],
        *,
        uplink: Channel | None = None,
        downlink: Channel | None = None,
        estimates: EstimateStore | None = None,
    ) -> None:
        self._folder = folder
        self._uplink = uplink or Channel((), specs, seed=0)
        self._downlink = downlink or Channel((), specs, seed=0, direction="down")
        self._estimates = EstimateBook(estimates, self._uplink)
        self._states: dict[str, str] = {}
        self._round = 0
        self._late: dict[str, int] = {}
        self._is_sealed = False
        self._writing = threading.Lock()

    @property
    def round(self) -> int:
        """The open round; 0 before the first and between two."""
        return self._round

    def open(
        self,
        round: int,
        late: Mapping[str, int] | None = None,
        *,
        states: Mapping[str, str] | None = None,
    ) -> None:
        """Begin a round, or go on with it: updates that are there stay, those of other rounds go.

        Args:
            round: its number.
            late: clients that go on with an earlier round, which stays too.
            states: names what each client kept of its last update that counted, from which its next one starts.
        """
        with self._writing:
            self._states = dict(states or {})
            self._late = dict(late or {})  # first: the service looks up where a late client's files are
            self._round, self._is_sealed = round, False
            self._folder_of(round).mkdir(parents=True, exist_ok=True)
        self._sweep()
        for part in self._folder_of(round).glob(".*.part"):
            part.unlink()

    def seal(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """The global model is about to move: from now on the open round's stages come from what is kept here.

        Args:
            state: what the round started from, if someone goes on with it; None keeps nothing.
        """
        with self._writing:
            path = self._folder_of(self._round) / _MODEL
            if state is not None and not path.exists():
                write_atomically(path, lambda part: save_file(dict(state), part))
            self._is_sealed = True

    def keeps(self, round: int) -> bool:
        """Whether the model that an earlier round started from is here, for those who go on with it."""
        return (self._folder_of(round) / _MODEL).exists()

    def close(self, late: Mapping[str, int] | None = None) -> None:
        """Delete the open round's files, once its result is committed.

        Args:
            late: clients that go on with it, or with an earlier one, whose files stay.
        """
        self._late = dict(late or {})
        self._round = 0
        self._sweep()

    def decide(self, decision: Mapping[str, Any]) -> None:
        """Write down how the open round was closed, so that it is closed in the same way again."""
        path = self._folder_of(self._round) / _DECISION
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(decision))
        flush(part)
        os.replace(part, path)
        flush(path.parent)

    def decision(self) -> dict[str, Any] | None:
        """How an earlier process of the coordinator closed the open round; None if it did not get so far."""
        path = self._folder_of(self._round) / _DECISION
        return json.loads(path.read_text()) if path.exists() else None

    def found(self, pushed: Mapping[str, Sequence[Sequence[str]]]) -> dict[tuple[str, int], str]:
        """Updates of the open round that an earlier process of the coordinator left.

        A client of which one is unsound, or does not fit its plan, loses them all.

        Args:
            pushed: the tensors that each device of each client must have pushed, in order of rank.

        Returns:
            The generation that made each, by client and rank; clients in the order of their last updates.
        """
        generations, arrived_ns = dict[tuple[str, int], str](), Counter[str]()
        for client, names in pushed.items():
            try:
                for path in self._paths(client):
                    rank = int(path.name.split(".")[-2])
                    wanted = names[rank] if rank < len(names) else ()
                    generations[client, rank] = self._read(path, client, wanted).generation
                    arrived_ns[client] = max(arrived_ns[client], path.stat().st_mtime_ns)
            except (RefusedError, OSError):  # of another plan, perhaps
                for path in self._paths(client):
                    path.unlink()
                generations = {key: value for key, value in generations.items() if key[0] != client}
        return dict(sorted(generations.items(), key=lambda item: arrived_ns[item[0][0]]))

    def discard(self, client: str, rank: int, *, part: Path | None = None) -> None:
        """Delete an update: it was made by a pipeline that is no more, or for a round that is over.

        Args:
            client, rank: whose it is.
            part: as which it was streamed; None for one that is in the journal for the client's present round.
        """
        path = self._path(client, rank)
        (path if part is None else part.with_name(path.name)).unlink(missing_ok=True)

    def global_stage(
        self,
        names: Sequence[str],
        state: Mapping[str, torch.Tensor],
        key: str,
        *,
        client: str = "",
        compressed: bool = False,
        difference: Mapping[str, torch.Tensor] | None = None,
    ) -> Path:
        """The file of a global stage as it goes out, written when first asked for.

        Args:
            names: its tensors.
            state: the present global model.
            key: names the stage; equal stages of several clients share a file.
            client: who asks; one that is late gets the stage that it started from.
            difference: payload of what is new to a client that holds the stage of the round before; None for the whole.
            compressed: for a device that can undo it; the file's suffix is `.zst` then, if the job's downlink
                has `Zstd` and it is worth it.

        Raises:
            RefusedError: the round is closed, and nobody goes on with it.
        """
        round = self._late.get(client, self._round)
        kind = "global" if difference is None else "difference"
        path = self._folder_of(round) / f"{kind}-{key}.safetensors"
        with self._writing:
            if not path.exists():
                tensors = self._started_from(round, names, state)
                if not self._downlink.chain.keeps_estimate:
                    payload, _ = self._downlink.encode(tensors, {}, sender="", round=round)
                elif difference is None:
                    payload = tensors
                else:
                    payload = self._downlink.replaced(tensors, difference)
                write_atomically(path, lambda part: save_file(payload, part))
            return self._compressed(path) if compressed else path

    def _started_from(
        self, round: int, names: Sequence[str], state: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Tensors of the global model that a round started from."""
        if round == self._round and not self._is_sealed:
            return {name: state[name] for name in names}
        model = self._folder_of(round) / _MODEL
        if not model.exists():
            raise RefusedError(f"round {round} is over", status=409, reason="wrong-round")
        with safe_open(model, framework="pt") as kept:
            return {name: kept.get_tensor(name) for name in names}

    def _compressed(self, path: Path) -> Path:
        zstd = self._downlink.chain.zstd
        if zstd is None:
            return path
        small = path.with_suffix(".zst")
        if not small.exists():
            body = zstd.compress(path.read_bytes())
            # empty if it is not worth it, so that this is found out once
            write_atomically(small, lambda part: part.write_bytes(body or b""))
        return small if small.stat().st_size else path

    def temporary(self, client: str, rank: int) -> Path:
        """Where to stream an upload before it is checked; another place each time."""
        return self._path(client, rank).parent / f".{client}.{rank}.{uuid.uuid4().hex}.part"

    def unpack(self, part: Path, client: str, rank: int, *, max_bytes: int) -> Path:
        """Decompress a streamed upload; returns the new file, in a temporary place as the old one.

        Raises:
            RefusedError: it is not compressed by Zstandard, or has more than `max_bytes`.
        """
        unpacked = self.temporary(client, rank)
        try:
            with part.open("rb") as packed, unpacked.open("wb") as file:
                for piece in decompress(iter(lambda: packed.read(_PIECE), b""), max_bytes=max_bytes):
                    file.write(piece)
        except PayloadError as error:
            unpacked.unlink(missing_ok=True)
            status = 413 if error.reason == "too-long" else 422
            raise RefusedError(str(error), status=status, reason=error.reason) from error
        except OSError:
            unpacked.unlink(missing_ok=True)
            raise
        return unpacked

    def accept(
        self, part: Path, client: str, rank: int, names: Sequence[str], *, generation: str = ""
    ) -> DeviceReport:
        """Check a streamed upload and take it into the journal.

        Args:
            part: the streamed file.
            client, rank: whose it is.
            names: the tensors that it must hold, no more and no less.
            generation: of the client's pipeline; an update of another one is refused. Empty takes any.

        Raises:
            RefusedError: it is not a safetensors file, or holds anything but finite tensors of the
                right names, shapes and dtypes, or no valid report.
        """
        report = self._read(part, client, names)
        if generation and report.generation != generation:
            raise RefusedError(
                f"this update was made by generation {report.generation or 'none'!r} of {client}'s pipeline, "
                f"which is over; generation {generation!r} is up",
                status=409,
                reason="wrong-generation",
            )
        flush(part)  # an acknowledged update must survive a loss of power, too
        # beside the part, which was begun when its round took uploads: another one may be open by now
        os.replace(part, part.with_name(self._path(client, rank).name))
        flush(part.parent)
        return report

    def has(self, client: str, rank: int) -> bool:
        """Whether this device's update is in the journal."""
        return self._path(client, rank).exists()

    def holds_same(self, part: Path, client: str, rank: int) -> bool:
        """Whether a streamed upload is the very update that is in the journal."""
        return filecmp.cmp(part, self._path(client, rank), shallow=False)

    def update_of(self, client: str, num_devices: int) -> ClientUpdate | None:
        """A client's whole update; None while a device's is missing."""
        paths = [self._path(client, rank) for rank in range(num_devices)]
        if not all(path.exists() for path in paths):
            return None
        bodies = [safe_open(path, framework="pt") for path in paths]
        reports = tuple(DeviceReport.model_validate_json(body.metadata()["report"]) for body in bodies)
        round = self._late.get(client, self._round)
        forgotten = [name for report in reports for name in report.forgotten]
        held = self._estimates.of(client, self._states.get(client, ""), forgotten)
        return ClientUpdate(
            client, round, Decoded(UpdateFiles(bodies), self._uplink, client, round, held), reports
        )

    def remember(self, updates: Sequence[ClientUpdate]) -> None:
        """Hold updates that count, where later ones are told as differences to them.

        Raises:
            OSError: the disk is full, say.
        """
        with disk_errors():
            for update in updates:
                self._estimates.remember(update, self._states.get(update.client, ""))

    def _read(self, path: Path, client: str, names: Sequence[str]) -> DeviceReport:
        """Check a file from the first byte to the last; returns its report."""
        try:
            with safe_open(path, framework="pt") as body:
                self._check_names(body, names)
                report = DeviceReport.model_validate_json((body.metadata() or {}).get("report", ""))
                self._check(body, client, names, report.forgotten)
        except SafetensorError as error:
            raise RefusedError(
                f"the body is not a safetensors file: {error}", status=422, reason="malformed"
            ) from error
        except ValidationError as error:
            raise RefusedError(
                f"the update's report is not valid: {error.errors()[0]['msg']}",
                status=422,
                reason="malformed",
            ) from error
        check_report(report)
        return report

    def _check_names(self, body: safe_open, names: Sequence[str]) -> None:
        got = set(body.keys())
        wanted = {part for name in names for part in self._uplink.parts(name)}
        if got != wanted:
            missing, unknown = sorted(wanted - got)[:5], sorted(got - wanted)[:5]
            raise RefusedError(
                f"an update of this device's stages has {len(wanted)} tensors; missing {missing}, unknown {unknown}",
                status=422,
                reason="wrong-tensors",
            )

    def _check(self, body: safe_open, client: str, names: Sequence[str], forgotten: Sequence[str]) -> None:
        round = self._late.get(client, self._round)
        held = self._estimates.of(client, self._states.get(client, ""), forgotten)
        for name in names:
            try:
                self._uplink.check(name, body.get_tensor, sender=client, round=round, estimates=held)
            except PayloadError as error:
                raise RefusedError(str(error), status=422, reason=error.reason) from error

    def _sweep(self) -> None:
        """Delete what nobody needs any more."""
        kept = {self._folder_of(round) for round in (self._round, *self._late.values())}
        for folder in self._folder.glob("round-*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
            elif folder != self._folder_of(self._round):
                for path in folder.glob("*.*.safetensors"):  # updates; an upload may come in beside this
                    if self._path(path.name.split(".")[0], 0).parent != folder:
                        path.unlink()

    def _folder_of(self, round: int) -> Path:
        return self._folder / f"round-{round:05d}"

    def _path(self, client: str, rank: int) -> Path:
        return self._folder_of(self._late.get(client, self._round)) / f"{client}.{rank}.safetensors"

    def _paths(self, client: str) -> list[Path]:
        """The updates of a client that are there."""
        return list(self._path(client, 0).parent.glob(f"{client}.*.safetensors"))
