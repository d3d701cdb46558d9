"""Checkpoints: the global model after each round, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmp.coordinator.disk import disk_errors, flush
from fedmp.coordinator.roster import Roster, Standing
from fedmp.errors import ResumeError
from fedmp.records import RoundRecord

__all__ = ["Checkpoint", "CheckpointStore"]

_FORMAT = 2  # of what is written; 1, which was not written down, had a roster of records


@dataclass(frozen=True)
class Checkpoint:
    """What a round left.

    Attributes:
        round: the last committed round.
        fingerprint: of the model.
        state: the global model's tensors by canonical name.
        optimizer_tensors, optimizer_values: state of the server optimizer.
        optimizer: its name; empty for plain averaging.
        record: the round's row, so that it survives with the round; None before the first.
        slots: state of the strategy's rule, by name.
        roster: what is remembered of the clients.
    """

    round: int
    fingerprint: str
    state: Mapping[str, torch.Tensor]
    optimizer_tensors: Mapping[str, torch.Tensor]
    optimizer_values: Mapping[str, Any]
    optimizer: str = ""
    record: RoundRecord | None = None
    slots: Mapping[str, torch.Tensor] = field(default_factory=dict)
    roster: Roster = field(default_factory=dict)


class CheckpointStore:
    """Checkpoints in a folder, one sub-folder a round.

    Args:
        folder: made when the first checkpoint is saved.
        keep: how many of the newest to keep.
        before: called before each is saved, to make safe what goes before it.
    """

    def __init__(self, folder: Path, *, keep: int = 2, before: Callable[[], None] = lambda: None) -> None:
        self._folder = folder
        self._keep = keep
        self._before = before

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; a crash at any moment leaves the one before intact.

        Raises:
            OSError: the disk is full, say.
        """
        with disk_errors():
            self._before()
            self._save(checkpoint)

    def _save(self, checkpoint: Checkpoint) -> None:
        final = self._folder / f"round-{checkpoint.round:05d}"
        part = self._folder / f".round-{checkpoint.round:05d}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        files = {
            "model": checkpoint.state,
            "optimizer": checkpoint.optimizer_tensors,
            "slots": checkpoint.slots,
        }
        if not checkpoint.slots:
            del files["slots"]
        for name, tensors in files.items():
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, part / f"{name}.safetensors")
        manifest = {
            "format": _FORMAT,
            "round": checkpoint.round,
            "fingerprint": checkpoint.fingerprint,
            "optimizer_values": dict(checkpoint.optimizer_values),
            "optimizer": checkpoint.optimizer,
            "record": checkpoint.record.model_dump() if checkpoint.record else None,
            "roster": dict(checkpoint.roster),
            "tensors": {name: list(tensor.shape) for name, tensor in checkpoint.state.items()},
        }
        (part / "manifest.json").write_text(json.dumps(manifest))  # an indent would take three times as long
        for path in (*part.iterdir(), part):
            flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        flush(self._folder)
        for old in self._rounds()[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Checkpoint:
        """The newest checkpoint.

        Raises:
            ResumeError: there is none, or it cannot be read.
        """
        rounds = self._rounds()
        if not rounds:
            raise ResumeError(f"nothing to resume: {self._folder} holds no checkpoint")
        path = rounds[-1]
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if manifest.get("format", 1) != _FORMAT:
                raise ResumeError(
                    f"checkpoint {path} was written by another version of fedmp (format {manifest.get('format', 1)}, "
                    f"this one reads {_FORMAT}); resume it with that version, or begin a new run"
                )
            return Checkpoint(
                round=manifest["round"],
                fingerprint=manifest["fingerprint"],
                state=load_file(path / "model.safetensors"),
                optimizer_tensors=load_file(path / "optimizer.safetensors"),
                optimizer_values=manifest["optimizer_values"],
                optimizer=manifest["optimizer"],
                record=manifest["record"] and RoundRecord.model_validate(manifest["record"]),
                slots=load_file(slots) if (slots := path / "slots.safetensors").exists() else {},
                roster={
                    client: Standing.of_json(standing) for client, standing in manifest["roster"].items()
                },
            )
        except (AttributeError, OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ResumeError(f"checkpoint {path} cannot be read: {error}") from error

    def _rounds(self) -> list[Path]:
        return sorted(self._folder.glob("round-*")) if self._folder.is_dir() else []
