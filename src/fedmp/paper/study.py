"""The whole comparison: train the federation, train centrally, train with failures, predict times, write it down."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedmp.engine import Job, Result
from fedmp.engine.prepare import Prepared, prepare
from fedmp.errors import ConfigError
from fedmp.paper.curves import CurvePoint, compute_curves
from fedmp.paper.settings import PaperSettings
from fedmp.paper.table import PaperRow, make_rows
from fedmp.paper.times import CenterTimes, SiteTimes, Workload, time_center, time_sites
from fedmp.records import Observer
from fedmp.report.files import write_atomically
from fedmp.topology import Link

__all__ = ["PaperResult", "run_curves", "run_paper"]

ViewMaker = Callable[[], AbstractContextManager[Observer]]


@dataclass(frozen=True)
class PaperResult:
    """What came out.

    Attributes:
        rows: the table.
        points: the curves.
        files: that were written.
    """

    rows: tuple[PaperRow, ...]
    points: tuple[CurvePoint, ...]
    files: tuple[Path, ...]


def run_paper(
    job: Job,
    settings: PaperSettings,
    folder: Path,
    *,
    make_view: ViewMaker,
    config: Mapping[str, Any] | None = None,
) -> PaperResult:
    """Compare a federation with centralized training.

    Args:
        job: the federation, with `centralized` set.
        settings: the centre, the failures, the variations.
        folder: for the runs and the results.
        make_view: makes an observer of each run.
        config: written down with the results: every assumption.

    Returns:
        The table, the curves, and where they are.

    Raises:
        ConfigError: the job has no centralized training, the folder holds results, or this is one of several processes.
        FedmpError: a run fails.
    """
    from fedmp.engine.ranks import (
        place_in_environment,
    )  # with torch.distributed, and every config imports this module

    rank, num_ranks = place_in_environment()
    if num_ranks > 1:
        raise ConfigError(
            f"the comparison of paper runs in one process, but this is rank {rank} of {num_ranks}; start it without "
            f"torchrun or srun (`fedmp simulate` can be shared out over ranks)"
        )
    # matplotlib takes as long as half of torch to import, and every config imports this module
    from fedmp.paper.pictures import draw_paper

    if job.centralized is None:
        raise ConfigError(
            "paper compares with centralized training; say how it is done: centralized={optimizer: ...}"
        )
    weakened = _weakened(job, settings)  # before anything is trained, so that a wrong name is told at once
    result = _run(job, folder / "federated", make_view, config)
    failing = None if weakened is None else _run(weakened, folder / "failing", make_view, config)
    workload, sites, center, sizes = _predict(job, settings)
    rows = make_rows(
        result.summary,
        sites,
        center,
        failing.summary if failing else None,
        num_center=center.num_devices,
        num_lost=len(settings.losses),
    )
    points = compute_curves(workload, settings, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "rows": [asdict(row) for row in rows],
        "sites": asdict(sites),
        "center": _plain_center(center),
        "federated": result.summary.model_dump(mode="json"),
        "failing": failing.summary.model_dump(mode="json") if failing else None,
        "assumptions": dict(config or {}),
    }
    files = [_write(folder / "paper.json", plain), folder / "paper.png"]
    draw_paper(
        rows,
        result.history,
        failing.history if failing else (),
        center,
        result.summary.centralized_accuracy,
        files[-1],
    )
    return PaperResult(tuple(rows), tuple(points), (*files, *_write_curves(points, folder)))


def run_curves(job: Job, settings: PaperSettings, folder: Path) -> PaperResult:
    """The curves alone, without any training.

    Args:
        job: the federation.
        settings: the centre and the variations.
        folder: for the results.

    Raises:
        FedmpError: the job cannot be prepared.
    """
    workload, _, _, sizes = _predict(job, settings)
    points = compute_curves(workload, settings, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    return PaperResult((), tuple(points), _write_curves(points, folder))


def _weakened(job: Job, settings: PaperSettings) -> Job | None:
    """The federation whose devices fail; None if none shall.

    Raises:
        ConfigError: there is no such device, or the strategy needs all clients whatever happens.
    """
    if not settings.losses:
        return None
    if not hasattr(job.strategy, "min_clients"):
        raise ConfigError(
            f"paper.losses: {type(job.strategy).__name__} has no min_clients to go on with fewer sites"
        )
    return replace(
        job,
        centralized=None,
        clock=job.clock.model_copy(update={"losses": settings.losses}),
        strategy=job.strategy.model_copy(update={"min_clients": settings.losses_min_clients}),  # type: ignore[attr-defined]
        title=f"{job.title}: failures",
    )


def _run(job: Job, folder: Path, make_view: ViewMaker, config: Mapping[str, Any] | None) -> Result:
    with make_view() as view:
        return job.run("simulate", run_dir=folder, observe=view, config=config)


def _predict(job: Job, settings: PaperSettings) -> tuple[Workload, SiteTimes, CenterTimes, list[int]]:
    prepared = prepare(job)
    setups = list(prepared.clients.values())
    sizes = [setup.num_samples for setup in setups]
    per_round = sum(setup.round_samples for setup in setups)
    settings_of = job.centralized
    workload = Workload(
        job=job,
        graph=prepared.graph,
        model=prepared.model,
        sample_bytes=_raw_bytes(prepared) / len(prepared.data.train),
        epochs=job.rounds * per_round / sum(sizes),
        center_batch=(settings_of.batch_size if settings_of else None) or job.batch_size,
    )
    by_uplink: dict[Link, list[int]] = {}
    for setup, size in zip(setups, sizes, strict=True):
        by_uplink.setdefault(setup.client.uplink, []).append(size)
    sites = time_sites(setups, sizes, job.clock, seed=job.seed)
    return workload, sites, time_center(workload, settings, by_uplink), sizes


def _raw_bytes(prepared: Prepared) -> int:
    """As the data set stores them."""
    train = prepared.data.train
    raw = [tensor for tensor in (train.inputs, train.targets) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in raw)


def _plain_center(center: CenterTimes) -> dict[str, Any]:
    return {**asdict(center), "epoch_s": center.epoch_s}


def _write_curves(points: Sequence[CurvePoint], folder: Path) -> tuple[Path, Path]:
    from fedmp.paper.pictures import draw_curves

    rows = [{**asdict(point), "improvement": point.improvement} for point in points]
    draw_curves(points, folder / "curves.png")
    return _write(folder / "curves.json", rows), folder / "curves.png"


def _write(path: Path, plain: Any) -> Path:
    write_atomically(path, f"{json.dumps(plain, indent=2, ensure_ascii=False)}\n".encode())
    return path
