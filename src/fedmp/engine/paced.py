"""Checkpoints of a simulation: seldom, where a round takes less than writing it down."""

from __future__ import annotations

import time

from fedmp.coordinator import Checkpoint, CheckpointStore

__all__ = ["PacedCheckpoints"]


class PacedCheckpoints(CheckpointStore):
    """Saves the last round, and of the others one every few seconds: what is lost is soon done again.

    Args:
        store: saves them.
        last_round: of the run.
        every_s: seconds between two.
    """

    def __init__(self, store: CheckpointStore, *, last_round: int, every_s: float) -> None:
        self._store, self._last_round, self._every_s = store, last_round, every_s
        self._saved_s = time.monotonic()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, if it is time for one."""
        if checkpoint.round < self._last_round and time.monotonic() - self._saved_s < self._every_s:
            return
        self._store.save(checkpoint)
        self._saved_s = time.monotonic()

    def latest(self) -> Checkpoint:
        """The newest checkpoint that was saved."""
        return self._store.latest()
