"""Run a job from start to end: prepare, resume if asked, let an engine do the rounds, compare, report."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fedmp.coordinator import Checkpoint, CheckpointStore, GlobalModel, Roster
from fedmp.engine.central import CentralizedResult, train_centrally
from fedmp.engine.job import Engine, Job, Result
from fedmp.engine.prepare import Prepared
from fedmp.engine.ranks import Ranks, begin, following, join_ranks, leading
from fedmp.engine.session import Outcome, Session
from fedmp.errors import ConfigError, ResumeError
from fedmp.records import (
    Event,
    Note,
    Observer,
    RoundFinished,
    RoundRecord,
    RoundTimed,
    RunFinished,
    RunStarted,
    Summary,
)
from fedmp.report import RunDirectory, make_view

__all__ = ["run_job"]

# imported when one is chosen: a simulation needs no web server
_ENGINES = {
    "local": ("fedmp.engine.local", "LocalEngine"),
    "simulate": ("fedmp.engine.simulate", "SimulateEngine"),
}


def run_job(
    job: Job,
    engine: str | Engine,
    *,
    run_dir: str | Path | None,
    resume: bool,
    observe: Observer | None,
    config: Mapping[str, Any],
) -> Result:
    """Run a job; see `Job.run`.

    Raises:
        ConfigError: there is no such engine.
        FedmpError: as `Job.run` says.
    """
    if isinstance(engine, str):
        if engine not in _ENGINES:
            raise ConfigError(f"no engine is called {engine!r}; there are {', '.join(_ENGINES)}")
        module, name = _ENGINES[engine]
        made_engine: Engine = getattr(importlib.import_module(module), name)()
        engine = made_engine
    settings = getattr(engine, "ranks", None)
    with contextlib.nullcontext() if settings is None else join_ranks(settings) as ranks:
        if ranks is None:
            return _run_here(job, engine, None, run_dir, resume, observe, config)
        if not ranks.is_first:
            return _follow(job, engine, ranks)
        with leading(ranks) as end:
            result = _run_here(job, engine, ranks, run_dir, resume, observe, config)
            end(*_told(result))
        return result


def _run_here(
    job: Job,
    engine: Engine,
    ranks: Ranks | None,
    run_dir: str | Path | None,
    resume: bool,
    observe: Observer | None,
    config: Mapping[str, Any],
) -> Result:
    """Run a job in this process, which writes the run directory."""
    run_dir = Path(run_dir or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}").expanduser()
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    try:
        directory = _directory(run_dir, resume=resume)
        if observe is not None:
            return _run(job, engine, ranks, directory, resume, observe, config)
        with make_view() as view:
            return _run(job, engine, ranks, directory, resume, view, config)
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()  # only succeeds if the job failed before it wrote anything


def _run(
    job: Job,
    engine: Engine,
    ranks: Ranks | None,
    directory: RunDirectory,
    resume: bool,
    observe: Observer,
    config: Mapping[str, Any],
) -> Result:
    started_s = time.monotonic()
    engine.warm_up()
    observe(Note("reading data, tracing the model, planning"))
    prepared = engine.prepare(job)
    model = _initial_model(prepared)
    checkpoints = CheckpointStore(directory.path / "checkpoints", before=directory.sync_metrics)
    before: tuple[RoundRecord, ...] = ()
    roster: Roster = {}
    if resume:
        before, roster = _resume(directory, checkpoints, prepared, model)
    else:
        _begin(directory, checkpoints, prepared, model, config)
    first_round = before[-1].round + 1 if before else 1
    if ranks is not None:
        begin(ranks, prepared.fingerprint, directory.path)

    def tell(event: Event) -> None:
        if isinstance(event, RoundFinished):
            directory.append_metrics(event.record)
        elif isinstance(event, RoundTimed):
            directory.append_events(event)
        observe(event)

    observe(_started(prepared, engine, first_round))
    outcome = engine.run(
        Session(
            prepared=prepared,
            model=model,
            checkpoints=checkpoints,
            journal_folder=directory.path / "journal",
            state_folder=directory.path / "state",
            first_round=first_round,
            started_s=started_s,
            simulated_s=sum(record.simulated_s for record in before),
            observe=tell,
            config=config,
            late=before[-1].late if before else {},
            roster=roster,
            ranks=ranks,
        )
    )
    records = (*before, *outcome.records)
    central = _compare(prepared, observe)
    summary = _summary(prepared, engine, records, outcome, central, time.monotonic() - started_s)
    _write_results(directory, prepared, summary, records, outcome, observe)
    return Result(
        history=records,
        model=_final_model(prepared, model),
        summary=summary,
        plans=prepared.plans,
        run_dir=directory.path,
    )


def _started(prepared: Prepared, engine: Engine, first_round: int) -> RunStarted:
    return RunStarted(
        title=prepared.job.title,
        engine=engine.name,
        num_rounds=prepared.job.rounds,
        first_round=first_round,
        plans=prepared.plans,
        data=prepared.table,
        label_names=prepared.data.train.label_names,
    )


def _follow(job: Job, engine: Engine, ranks: Ranks) -> Result:
    """Train what rank 0 tells; returns its result."""
    with following(ranks) as ready:
        prepared = engine.prepare(job)
        path = ready(prepared.fingerprint)
    model = _initial_model(prepared)
    head, state = engine.follow(  # type: ignore[attr-defined]
        Session(
            prepared=prepared,
            model=model,
            checkpoints=CheckpointStore(path / "checkpoints"),
            journal_folder=path / "journal",
            state_folder=path / "state",
            first_round=1,
            ranks=ranks,
        )
    )
    for name, tensor in state.items():
        model.state[name].copy_(tensor)
    return Result(
        history=tuple(map(RoundRecord.model_validate_json, head["history"])),
        model=_final_model(prepared, model),
        summary=Summary.model_validate_json(head["summary"]),
        plans=prepared.plans,
        run_dir=path,
    )


def _told(result: Result) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A result as the other ranks are told."""
    head = {
        "history": [record.model_dump_json() for record in result.history],
        "summary": result.summary.model_dump_json(),
    }
    # by canonical name alone: one that is tied has others, too
    named = [*result.model.named_parameters(), *result.model.named_buffers()]
    return head, {name: tensor.detach() for name, tensor in named}


def _initial_model(prepared: Prepared) -> GlobalModel:
    job = prepared.job
    return GlobalModel(
        prepared.specs,
        {name: tensor.detach().clone() for name, tensor in prepared.initial_state().items()},
        job.server_optimizer or job.strategy.server_optimizer,
        rule=job.strategy.server_rule,
        received=job.strategy.local_rule.received if job.strategy.local_rule else (),
        own=prepared.scope.own,
        downlink=job.downlink_channel(prepared.specs),
    )


def _begin(
    directory: RunDirectory,
    checkpoints: CheckpointStore,
    prepared: Prepared,
    model: GlobalModel,
    config: Mapping[str, Any],
) -> None:
    """Write down what there is before the first round."""
    for leftover in ("journal", "checkpoints", "state"):  # of a run that failed in its first round
        shutil.rmtree(directory.path / leftover, ignore_errors=True)
    directory.truncate_events(0)
    directory.write_config(config)
    directory.write_plans(prepared.plans)
    checkpoints.save(Checkpoint(0, prepared.fingerprint, model.state, {}, {}, slots=model.slots))


def _compare(prepared: Prepared, observe: Observer) -> CentralizedResult | None:
    """Train centrally, if that was asked for and the data are here."""
    if prepared.job.centralized is None:
        return None
    if not prepared.has_clients_data:
        observe(Note("no centralized training to compare with: the clients' data are not here"))
        return None
    observe(Note("training centrally, to compare"))
    return train_centrally(prepared, prepared.job.centralized)


def _write_results(
    directory: RunDirectory,
    prepared: Prepared,
    summary: Summary,
    records: tuple[RoundRecord, ...],
    outcome: Outcome,
    observe: Observer,
) -> None:
    timeline = next(iter(outcome.timelines.values()), ())
    directory.sync_metrics()
    directory.write_summary(summary)
    directory.write_pictures(
        plans=prepared.plans,
        clients=prepared.table,
        records=records,
        label_names=prepared.data.train.label_names,
        timeline=timeline,
        centralized_accuracy=summary.centralized_accuracy,
    )
    if prepared.job.trace:
        directory.write_traces(outcome.timelines, prepared.plans)
        if not outcome.timelines:
            observe(Note(f"trace: the engine {summary.engine!r} measures no steps; use engine=local"))
    observe(RunFinished(summary, records, str(directory.path), timeline))


def _directory(run_dir: Path, *, resume: bool) -> RunDirectory:
    if resume and not run_dir.is_dir():
        raise ResumeError(f"nothing to resume: {str(run_dir)!r} is not a run directory")
    directory = RunDirectory.create(run_dir)
    if not resume and directory.has_metrics:
        raise ConfigError(
            f"run_dir {str(directory.path)!r} holds a run already; go on with it by resume={run_dir}, or "
            f"choose another with run_dir=PATH"
        )
    return directory


def _resume(
    directory: RunDirectory,
    checkpoints: CheckpointStore,
    prepared: Prepared,
    model: GlobalModel,
) -> tuple[tuple[RoundRecord, ...], Roster]:
    """Load the last committed round into the global model; returns the rounds so far, and who is known."""
    checkpoint = checkpoints.latest()
    if checkpoint.fingerprint != prepared.fingerprint:
        raise ResumeError(
            f"the run in {directory.path} trained another model (fingerprint {checkpoint.fingerprint}, this "
            f"{type(prepared.model).__name__} has {prepared.fingerprint}); resume with the config it began with"
        )
    # a coordinator that was killed after its last round comes back to send its devices home
    may_be_over = not prepared.has_clients_data
    if checkpoint.round > prepared.job.rounds or (
        checkpoint.round == prepared.job.rounds and not may_be_over
    ):
        raise ResumeError(
            f"the run in {directory.path} has finished {checkpoint.round} rounds; ask for more with rounds=NUMBER"
        )
    if checkpoint.optimizer_tensors and checkpoint.optimizer != model.optimizer_name:
        raise ResumeError(
            f"the run in {directory.path} has state of the server optimizer {checkpoint.optimizer}, which "
            f"{model.optimizer_name or 'plain averaging'} cannot use; resume with the config it began with"
        )
    for name, tensor in checkpoint.state.items():
        model.state[name].copy_(tensor)
    model.load_optimizer_state(checkpoint.optimizer_tensors, checkpoint.optimizer_values)
    model.load_slots(checkpoint.slots)
    directory.truncate_metrics(checkpoint.round)
    directory.truncate_events(checkpoint.round)
    rows = directory.read_metrics()
    if checkpoint.record is not None and (not rows or rows[-1].round < checkpoint.round):
        directory.append_metrics(checkpoint.record)  # the run ended between the commit and its row
        rows = (*rows, checkpoint.record)
    return rows, checkpoint.roster


def _summary(
    prepared: Prepared,
    engine: Engine,
    records: tuple[RoundRecord, ...],
    outcome: Outcome,
    central: CentralizedResult | None,
    wall_s: float,
) -> Summary:
    final = records[-1].test_accuracy if records else None
    central_accuracy = central.accuracy if central else None
    gap = None if final is None or central_accuracy is None else 100 * (central_accuracy - final)
    return Summary(
        engine=engine.name,
        rounds=len(records),
        clients=prepared.num_clients,
        devices=prepared.num_devices,
        num_parameters=sum(
            torch.Size(spec.shape).numel() for spec in prepared.specs.values() if spec.kind == "parameter"
        ),
        final_accuracy=final,
        centralized_accuracy=central_accuracy,
        accuracy_gap_points=gap,
        samples_processed=sum(record.num_examples for record in records),
        centralized_samples=central.samples if central else None,
        bytes_up=sum(record.bytes_up for record in records),
        bytes_down=sum(record.bytes_down for record in records),
        pipeline_bytes=sum(record.pipeline_bytes for record in records),
        centralized_bytes=central.num_bytes if central else None,
        wall_s=wall_s,
        simulated_s=sum(record.simulated_s for record in records),
        centralized_wall_s=central.wall_s if central else None,
        startup_s=outcome.startup_s,
        faults=sum(record.faults for record in records),
        recoveries=sum(record.recoveries for record in records),
    )


def _final_model(prepared: Prepared, model: GlobalModel) -> torch.nn.Module:
    with torch.no_grad():
        for name, tensor in prepared.initial_state().items():
            tensor.copy_(model.state[name])
    return prepared.model.eval()
