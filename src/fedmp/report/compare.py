"""Runs side by side: what run directories hold comes in, one row a run and a picture of all go out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fedmp.errors import ConfigError
from fedmp.records import RoundRecord
from fedmp.report.files import write_atomically
from fedmp.report.pictures.compare import Curve, draw_comparison
from fedmp.report.run_directory import RunDirectory
from fedmp.report.units import format_bytes, format_count, format_seconds, format_share, shorten

__all__ = ["ComparedRun", "comparison_table", "find_runs", "read_runs", "write_comparison"]

# how a run is shown and where it is kept, which does not make it another run
_NOT_ITS_NATURE = ("run_dir", "resume", "quiet", "logs", "trace", "title", "device")
_MAX_SETTINGS = 3
_MAX_LABEL = 44


@dataclass(frozen=True)
class ComparedRun:
    """A run in a row.

    Attributes:
        label: what sets it apart from the others.
        path: its run directory.
        rounds, clients, devices: of the run; devices are None where the run has not finished.
        accuracy: in the end, 0 to 1; None where it was not measured.
        best_accuracy: of any round.
        bytes_moved: up, down and between devices.
        simulated_s, wall_s: of all rounds.
        goal_accuracy: the least of all runs' best accuracies, which all of them reach.
        goal_round, goal_bytes, goal_s: when this one first reaches it, in rounds, bytes and simulated seconds.
    """

    label: str
    path: str
    rounds: int
    clients: int
    devices: int | None
    accuracy: float | None
    best_accuracy: float | None
    bytes_moved: int
    simulated_s: float
    wall_s: float
    goal_accuracy: float | None = None
    goal_round: int | None = None
    goal_bytes: int | None = None
    goal_s: float | None = None


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The run directories that are meant.

    Args:
        paths: run directories, or folders of run directories as a sweep leaves them.

    Raises:
        ConfigError: one is neither.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inner = sorted(path.glob("*/metrics.jsonl"), key=lambda file: _natural(file.parent.name))
        if (path / "metrics.jsonl").is_file():
            found.append(path)
        elif inner:
            found += [file.parent for file in inner]
        else:
            raise ConfigError(
                f"{str(path)!r} holds no run, nor do its folders: give run directories, which have a metrics.jsonl"
            )
    return list(dict.fromkeys(found))


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read what runs have left.

    Args:
        paths: run directories.

    Raises:
        ConfigError: a file cannot be read or a run has no rounds.
    """
    histories = [_rounds(path) for path in paths]
    labels = _labels([_json(path / "config.json") for path in paths], [path.name for path in paths])
    best = [_best(records) for records in histories]
    known = [value for value in best if value is not None]
    goal = min(known) if known and len(known) == len(paths) else None
    return [
        _row(label, path, records, goal)
        for label, path, records in zip(labels, paths, histories, strict=True)
    ]


def comparison_table(runs: Sequence[ComparedRun]) -> Table:
    """One row a run.

    Args:
        runs: as `read_runs` gives them.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, border_style="bright_black")
    table.add_column("run", overflow="fold", min_width=18)
    goal = runs[0].goal_accuracy if runs else None
    columns = ["rounds", "devices", "accuracy", "moved", "simulated"]
    for name in columns + ([] if goal is None else [f"to {format_share(goal)}"]):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        cells = [
            run.label,
            format_count(run.rounds),
            "-" if run.devices is None else format_count(run.devices),
            format_share(run.accuracy),
            format_bytes(run.bytes_moved),
            format_seconds(run.simulated_s),
        ]
        table.add_row(*cells, *([] if run.goal_s is None else [format_seconds(run.goal_s)]))
    return table


def write_comparison(runs: Sequence[ComparedRun], folder: Path | None = None) -> tuple[Path, ...]:
    """Write `comparison.json` and `comparison.png`.

    Args:
        runs: as `read_runs` gives them.
        folder: where; None for the folder that holds all of the runs.

    Returns:
        The files written.

    Raises:
        ConfigError: they cannot be written.
    """
    common = Path(os.path.commonpath([Path(run.path).parent for run in runs]))
    folder = common if folder is None else folder
    rows = json.dumps([asdict(run) for run in runs], indent=2, ensure_ascii=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "comparison.json", f"{rows}\n".encode())
        draw_comparison([_curve(run) for run in runs], folder / "comparison.png")
    except OSError as error:
        raise ConfigError(f"{str(folder)!r} cannot be written: {error.strerror or error}") from error
    return folder / "comparison.json", folder / "comparison.png"


def _rounds(path: Path) -> tuple[RoundRecord, ...]:
    records = RunDirectory(path).read_metrics()
    if not records:
        raise ConfigError(
            f"the run in {str(path)!r} has not committed a round yet; there is nothing to compare"
        )
    return records


def _row(label: str, path: Path, records: Sequence[RoundRecord], goal: float | None) -> ComparedRun:
    summary = _json(path / "summary.json")
    accuracies = [record.test_accuracy for record in records]
    tested = [value for value in accuracies if value is not None]
    reached = next(
        (index for index, value in enumerate(accuracies) if goal is not None and (value or 0.0) >= goal), None
    )
    until = records[: reached + 1] if reached is not None else ()
    return ComparedRun(
        label=label,
        path=str(path.absolute()),
        rounds=len(records),
        clients=summary.get("clients", len({name for record in records for name in record.clients})),
        devices=summary.get("devices"),
        accuracy=tested[-1] if tested else None,
        best_accuracy=_best(records),
        bytes_moved=sum(map(_moved, records)),
        simulated_s=sum(record.simulated_s for record in records),
        wall_s=sum(record.wall_s for record in records),
        goal_accuracy=goal,
        goal_round=until[-1].round if until else None,
        goal_bytes=sum(map(_moved, until)) if until else None,
        goal_s=sum(record.simulated_s for record in until) if until else None,
    )


def _curve(run: ComparedRun) -> Curve:
    records = RunDirectory(Path(run.path)).read_metrics()
    num_bytes = simulated_s = 0.0
    points = []
    for record in records:
        num_bytes += _moved(record)
        simulated_s += record.simulated_s
        points.append((record.round, num_bytes, simulated_s, record.test_accuracy))
    return Curve(shorten(run.label, _MAX_LABEL), tuple(points))


def _moved(record: RoundRecord) -> int:
    return record.bytes_up + record.bytes_down + record.pipeline_bytes


def _best(records: Sequence[RoundRecord]) -> float | None:
    return max((r.test_accuracy for r in records if r.test_accuracy is not None), default=None)


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none or it is no JSON."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _labels(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """What sets each run apart: the settings that differ, or else its folder's name."""
    flat = [dict(_flatten(config)) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    differing = [key for key in keys if len({str(config.get(key)) for config in flat}) > 1]
    named = [key.removesuffix(".name") for key in differing if key.endswith(".name")]
    # the name of a thing, or its class, stands for all that is in it
    chosen = [key for key in differing if key.endswith((".name", "._target_"))]
    groups = {key.rpartition(".")[0] for key in chosen} | set(named)
    chosen += [key for key in differing if not any(key.startswith(f"{group}.") for group in groups)]
    chosen = [key for key in differing if key in chosen][:_MAX_SETTINGS]
    labels = [
        ", ".join(f"{_short(key)}={_value(config.get(key))}" for key in chosen) or name
        for config, name in zip(flat, names, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} ({name})"
        for label, name in zip(labels, names, strict=True)
    ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if not prefix and key in _NOT_ITS_NATURE:
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(key: str) -> str:
    return key.removesuffix("._target_").removesuffix(".name")


def _value(value: Any) -> str:
    return value.rpartition(".")[2] if isinstance(value, str) else json.dumps(value)


def _natural(name: str) -> tuple[int, int | str]:
    """Job 10 of a sweep comes after job 9."""
    return (0, int(name)) if name.isdigit() else (1, name)
