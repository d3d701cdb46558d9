"""The directory that a run leaves behind: config, plans, a row a round, a summary, pictures.

Every file is whole or absent, whenever the process dies; `metrics.jsonl` may end in a torn line, which
readers skip and the next row replaces.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmp.errors import ConfigError
from fedmp.records import ClientData, Plan, RoundRecord, RoundTimed, Summary, TimedAction, rounds_of
from fedmp.report.files import write_atomically
from fedmp.report.trace import format_shares, predicted_busy, time_shares, write_chrome_trace

__all__ = ["RunDirectory"]


@dataclass(frozen=True)
class RunDirectory:
    """A run directory that exists and can be written. Made by `create`.

    Attributes:
        path: absolute path of the directory.

    Example:
        >>> run = RunDirectory.create(tempfile.mkdtemp())
        >>> run.append_metrics(RoundRecord(round=1, clients=("lab",), num_examples=64, train_loss=2.3))
        >>> run.read_metrics()[0].train_loss
        2.3
    """

    path: Path

    @classmethod
    def create(cls, path: str | Path) -> RunDirectory:
        """Make the directory, or take one that is there, and prove that it can be written.

        What an earlier run left there stays until it is replaced; see `has_metrics`.

        Args:
            path: where; parents are made as well.

        Returns:
            The run directory.

        Raises:
            ConfigError: it cannot be made or written; nothing was changed but perhaps empty directories.
        """
        directory = Path(path).expanduser().absolute()
        with _explained(directory):
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as probe:
                probe.write(b"fedmp")
        return cls(directory)

    @property
    def metrics_path(self) -> Path:
        """Where the rows are."""
        return self.path / "metrics.jsonl"

    @property
    def pictures_path(self) -> Path:
        """Where the pictures are; made when the first is drawn."""
        return self.path / "pictures"

    @property
    def has_metrics(self) -> bool:
        """Whether a run has committed a round here before."""
        return bool(self.read_metrics())

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.json`.

        Args:
            config: plain data that JSON can hold.

        Raises:
            ConfigError: the file cannot be written.
            TypeError: something in it is not plain data.
        """
        self._write("config.json", json.dumps(config, indent=2, ensure_ascii=False))

    def write_plans(self, plans: Mapping[str, Plan]) -> None:
        """Write `plan.json`.

        Args:
            plans: by client name.

        Raises:
            ConfigError: the file cannot be written.
        """
        plain = {client: plan.model_dump(mode="json") for client, plan in plans.items()}
        self._write("plan.json", json.dumps(plain, indent=2, ensure_ascii=False))

    def write_summary(self, summary: Summary) -> None:
        """Write `summary.json`.

        Args:
            summary: the finished run.

        Raises:
            ConfigError: the file cannot be written.
        """
        self._write("summary.json", json.dumps(_plain(summary), indent=2, ensure_ascii=False))

    def append_metrics(self, record: RoundRecord) -> None:
        """Append a row to `metrics.jsonl`, where it survives this process; see `sync_metrics`.

        Args:
            record: a committed round.

        Raises:
            ConfigError: the file cannot be written.
        """
        row = json.dumps(_plain(record), ensure_ascii=False) + "\n"
        with _explained(self.path), self.metrics_path.open("ab+") as file:
            _drop_torn_line(file)
            file.write(row.encode())

    def sync_metrics(self) -> None:
        """Make all rows survive a loss of power as well.

        A checkpoint holds the row of its own round, so rows need to be safe when the next one is saved, not before.

        Raises:
            ConfigError: the file cannot be written.
        """
        if self.metrics_path.exists():
            with _explained(self.path), self.metrics_path.open("rb+") as file:
                os.fsync(file.fileno())

    def read_metrics(self) -> tuple[RoundRecord, ...]:
        """Read the rows of `metrics.jsonl`.

        Returns:
            The rounds, in the order in which they were appended; a torn last line is left out.

        Raises:
            ConfigError: the file cannot be read, or holds a line that is no round.
        """
        if not self.metrics_path.exists():
            return ()
        with _explained(self.path, "read"):
            # A line without its end is torn, even where what is there happens to be valid.
            *lines, _ = self.metrics_path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(RoundRecord.model_validate_json(line))
            except ValueError as error:
                reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])
                raise ConfigError(
                    f"line {number} of {str(self.metrics_path)!r} is not a round ({reason}); "
                    f"remove the line, or choose another run_dir=PATH"
                ) from error
        return tuple(records)

    def truncate_metrics(self, after_round: int) -> None:
        """Drop the rows of later rounds, so that a resumed run appends them anew.

        Args:
            after_round: the last round to keep; 0 drops all.

        Raises:
            ConfigError: the file cannot be read or written.
        """
        kept = [record for record in self.read_metrics() if record.round <= after_round]
        rows = [json.dumps(_plain(record), ensure_ascii=False) for record in kept]
        self._write("metrics.jsonl", "\n".join(rows))

    @property
    def events_path(self) -> Path:
        """Where the events of simulated time are, if there are any."""
        return self.path / "events.jsonl"

    def append_events(self, timed: RoundTimed) -> None:
        """Append a simulated round's events to `events.jsonl`.

        Raises:
            ConfigError: the file cannot be written.
        """
        with _explained(self.path), self.events_path.open("a", encoding="utf-8") as file:
            file.write(timed.lines())

    def read_events(self) -> tuple[RoundTimed, ...]:
        """The events of each round, in the order in which they were appended; a torn last line is left out.

        Raises:
            ConfigError: the file cannot be read.
        """
        if not self.events_path.exists():
            return ()
        with _explained(self.path, "read"):
            lines = self.events_path.read_text(encoding="utf-8").splitlines()
        return rounds_of(lines)

    def truncate_events(self, after_round: int) -> None:
        """Drop the events of later rounds, so that a resumed run appends them anew.

        Raises:
            ConfigError: the file cannot be read or written.
        """
        if self.events_path.exists():
            kept = [timed.lines() for timed in self.read_events() if timed.round <= after_round]
            self._write("events.jsonl", "".join(kept).rstrip())

    def write_pictures(
        self,
        *,
        plans: Mapping[str, Plan],
        clients: Sequence[ClientData],
        records: Sequence[RoundRecord],
        label_names: Sequence[str] = (),
        timeline: Sequence[TimedAction] = (),
        centralized_accuracy: float | None = None,
        suffixes: Sequence[str] = (".svg",),
    ) -> tuple[Path, ...]:
        """Draw whatever there is to draw into `pictures/`; `clock`, if there are events of simulated time.

        Args:
            plans: by client name; draws `plan`.
            clients: who holds what; draws `data`.
            records: the rounds; draws `accuracy`.
            label_names: names of the labels, in label order.
            timeline: one measured pipeline step; draws `timeline`.
            centralized_accuracy: from 0 to 1; None where there is none.
            suffixes: which files to make of each picture, of ".svg" and ".png".

        Returns:
            The files written.

        Raises:
            ConfigError: a file cannot be written.
            ValueError: another suffix.
        """
        # matplotlib takes half a second to import, which the first round need not wait for
        from fedmp.report.pictures import draw_accuracy, draw_clock, draw_data, draw_plan, draw_timeline

        drawings: dict[str, Callable[[Path], None]] = {}
        if records:
            drawings["accuracy"] = lambda path: draw_accuracy(records, path, centralized_accuracy)
        if clients:
            drawings["data"] = lambda path: draw_data(clients, path, label_names)
        if plans:
            drawings["plan"] = lambda path: draw_plan(plans, path)
        if any(action.stop_s > 0 for action in timeline):
            drawings["timeline"] = lambda path: draw_timeline(timeline, path)
        timed = self.read_events()
        if timed:
            drawings["clock"] = lambda path: draw_clock(timed, path)
        written = []
        with _explained(self.pictures_path):
            self.pictures_path.mkdir(exist_ok=True)
            for name, draw in drawings.items():
                for suffix in suffixes:
                    path = self.pictures_path / f"{name}{suffix}"
                    draw(path)
                    written.append(path)
        return tuple(written)

    def write_traces(
        self, timelines: Mapping[str, Sequence[TimedAction]], plans: Mapping[str, Plan]
    ) -> tuple[Path, ...]:
        """Write each client's measured step into `traces/`: a picture, a Chrome trace and a table of shares.

        Args:
            timelines: the actions of one step, by client name.
            plans: by client name; what the step was predicted to be.

        Returns:
            The files written.

        Raises:
            ConfigError: a file cannot be written.
        """
        from fedmp.report.pictures import draw_timeline

        folder = self.path / "traces"
        written = []
        with _explained(folder):
            folder.mkdir(exist_ok=True)
            for client, actions in timelines.items():
                busy = predicted_busy(plans[client])
                picture, trace, table = (
                    folder / f"{client}{end}" for end in (".svg", ".trace.json", ".shares.txt")
                )
                if any(action.stop_s > 0 for action in actions):
                    draw_timeline(actions, picture, busy)
                    written.append(picture)
                write_chrome_trace(actions, trace)
                table.write_text(f"{format_shares(time_shares(actions, busy))}\n")
                written += [trace, table]
        return tuple(written)

    def _write(self, name: str, text: str) -> None:
        with _explained(self.path):
            write_atomically(self.path / name, f"{text}\n".encode() if text else b"")


@contextmanager
def _explained(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn the system's error into one that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"run_dir {str(path)!r} cannot be {verb}: {reason}; choose another with run_dir=PATH"
        ) from error


def _plain(record: RoundRecord | Summary) -> dict[str, Any]:
    """As JSON can hold it: a loss that is not finite becomes a word that pydantic reads back."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.model_dump(mode="python").items()
    }


def _drop_torn_line(file: Any) -> None:
    """Cut off what follows the last line end, in a file open for reading and appending."""
    file.seek(0)
    whole = file.read()
    if whole and not whole.endswith(b"\n"):
        file.truncate(whole.rfind(b"\n") + 1)
