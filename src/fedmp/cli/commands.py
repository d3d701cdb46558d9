"""What each command does: composes its config, runs it, shows the result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedmp.cli.compose import compose

if TYPE_CHECKING:
    from fedmp.config import RunConfig

__all__ = [
    "Terminated",
    "administer",
    "compare",
    "coordinator",
    "curves",
    "device",
    "plan",
    "presets",
    "run",
    "simulate",
]


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def _terminate(*_: object) -> None:
    raise Terminated


def administer(name: str, arguments: list[str]) -> None:
    """`fedmp certs`, `enroll` or `revoke`: the coordinator's certificates and credentials.

    Raises:
        ConfigError: the cryptography package is not there, or the arguments are wrong.
    """
    from fedmp.errors import ConfigError

    try:
        from fedmp import admin
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise ConfigError(
            f"`fedmp {name}` needs the cryptography package: pip install 'fedmp[deploy]'"
        ) from error
    getattr(admin, name)(arguments)


def run(arguments: list[str]) -> None:
    """`fedmp run`: one job, or a sweep of them and their comparison."""
    finished: list[Path] = []
    compose(arguments, lambda config: finished.append(_run_config(config)))
    from fedmp.engine.ranks import place_in_environment

    if len(finished) > 1 and place_in_environment()[0] == 0:
        _show_comparison(finished, None)


def simulate(arguments: list[str]) -> None:
    """`fedmp simulate`: short for `fedmp run engine=simulate`."""
    run(["engine=simulate", *arguments])


def plan(arguments: list[str]) -> None:
    """`fedmp plan`: how each client's model is cut; runs nothing."""
    as_json = "--json" in arguments
    compose([argument for argument in arguments if argument != "--json"], lambda c: _show_plan(c, as_json))


def compare(arguments: list[str]) -> None:
    """`fedmp compare`: several runs in one table and one picture.

    Raises:
        ConfigError: there is nothing to compare.
    """
    from fedmp.errors import ConfigError
    from fedmp.report.compare import find_runs

    out, paths = _take_value("--out", arguments)
    if not paths:
        raise ConfigError("`fedmp compare` needs run directories: fedmp compare RUN_DIR...")
    _show_comparison(find_runs(paths), None if out is None else Path(out))


def _show_comparison(paths: Sequence[Path], folder: Path | None) -> None:
    from rich.console import Console

    from fedmp.report.compare import comparison_table, read_runs, write_comparison

    runs = read_runs(paths)
    Console().print(comparison_table(runs))
    for path in write_comparison(runs, folder):
        print(f"written: {path}")


def presets(arguments: list[str]) -> None:
    """`fedmp presets`: devices and links that a topology may name.

    Raises:
        ConfigError: it was given arguments.
    """
    from rich.console import Console

    from fedmp.errors import ConfigError
    from fedmp.report.presets import presets_tables

    if arguments:
        raise ConfigError(f"`fedmp presets` takes no arguments, but has {' '.join(arguments)}")
    Console().print(presets_tables())


def coordinator(arguments: list[str]) -> None:
    """`fedmp coordinator`: serves a job to deployed devices, and resumes it where it was.

    Raises:
        ConfigError: the config is wrong, or names another engine.
    """
    from fedmp.engine.deploy import DeployEngine
    from fedmp.errors import ConfigError
    from fedmp.report import LogView, configure_logs

    configs: list[RunConfig] = []
    compose(["engine=deploy", *arguments], configs.append)
    signal.signal(signal.SIGTERM, _terminate)
    configure_logs(configs[0].logs or "text")
    for index, config in enumerate(configs):
        engine = config.make_engine()
        if not isinstance(engine, DeployEngine):
            raise ConfigError("`fedmp coordinator` runs the engine deploy; leave engine= out")
        run_dir = config.resume or config.run_dir
        config.job().run(
            engine.model_copy(update={"more_to_come": index + 1 < len(configs)}),
            run_dir=run_dir,
            resume=config.resume is not None or (run_dir is not None and (run_dir / "checkpoints").is_dir()),
            observe=LogView(),
            config=config.model_dump(mode="json"),
        )


def device(arguments: list[str]) -> None:
    """`fedmp device`: one deployed device, until its coordinator sends it home."""
    from fedmp.engine.device import LocalJob, run_deployed_device
    from fedmp.report import configure_logs

    credentials, arguments = _take_credentials(arguments)
    configs: list[RunConfig] = []
    compose(arguments, configs.append)
    signal.signal(signal.SIGTERM, _terminate)
    configure_logs(configs[0].logs or "text")
    settings = configs[0].device
    if credentials is not None:
        settings = settings.model_copy(update={"credentials": credentials})
    jobs = [LocalJob(config.job(), config.model_dump(mode="json")) for config in configs]
    run_deployed_device(jobs, settings)


def _take_credentials(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The value of `--credentials`, and the arguments without it.

    `{rank}` in it is the process's rank as torchrun or SLURM tells it, so that one command starts all.
    """
    from fedmp.errors import ConfigError

    value, kept = _take_value("--credentials", arguments)
    if value is None:
        return None, kept
    if "{rank}" in value:
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
        if rank is None:
            raise ConfigError("--credentials has {rank} in it, but neither RANK nor SLURM_PROCID is set")
        value = value.replace("{rank}", rank)
    return Path(value), kept


def _take_value(flag: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value that follows a flag, and the arguments without either."""
    kept, value = [], None
    given = iter(arguments)
    for argument in given:
        if argument == flag:
            value = next(given, "")
        elif argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        else:
            kept.append(argument)
    return value, kept


def _run_config(config: RunConfig) -> Path:
    """Run a job; returns its run directory."""
    if config.paper is not None:
        return _run_paper(config)
    from fedmp.engine.ranks import place_in_environment
    from fedmp.report import LogView, configure_logs, make_view

    engine = config.make_engine()
    # of several processes that simulate one job, the first speaks for all
    is_quiet = config.quiet or (engine.name == "simulate" and place_in_environment()[0] > 0)
    if config.logs:
        configure_logs(config.logs)
    with contextlib.nullcontext(LogView()) if config.logs else make_view(quiet=is_quiet) as view:
        result = config.job().run(
            engine,
            run_dir=config.resume or config.run_dir,
            resume=config.resume is not None,
            observe=view,
            config=config.model_dump(mode="json"),
        )
    return result.run_dir


def _run_paper(config: RunConfig) -> Path:
    """Compare with centralized training; returns the federation's run directory."""
    from rich.console import Console

    from fedmp.paper import paper_table, run_paper
    from fedmp.paper.curves import curves_tables
    from fedmp.paper.table import verdict
    from fedmp.report import make_view

    assert config.paper is not None
    folder = config.run_dir or Path(f"runs/paper_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    result = run_paper(
        config.job(),
        config.paper,
        folder,
        make_view=partial(make_view, quiet=config.quiet),
        config=config.model_dump(mode="json"),
    )
    console = Console()
    console.print(curves_tables(result.points), paper_table(result.rows), verdict(result.rows))
    for path in result.files:
        print(f"written: {path}")
    return folder / "federated"


def curves(arguments: list[str]) -> None:
    """`fedmp curves`: how the result of the paper's experiment depends on its assumptions; trains nothing."""
    if not any(argument.startswith("experiment=") for argument in arguments):
        arguments = ["experiment=paper", *arguments]
    compose(arguments, _show_curves)


def _show_curves(config: RunConfig) -> None:
    from rich.console import Console

    from fedmp.errors import ConfigError
    from fedmp.paper.curves import curves_tables
    from fedmp.paper.study import run_curves

    if config.paper is None:
        raise ConfigError(
            "`fedmp curves` varies what `paper` assumes, which is null here; use experiment=paper"
        )
    result = run_curves(config.job(), config.paper, config.run_dir or Path("runs/curves"))
    Console().print(curves_tables(result.points))
    for path in result.files:
        print(f"written: {path}")


def _show_plan(config: RunConfig, as_json: bool) -> None:
    from fedmp.engine.prepare import prepare

    prepared = prepare(config.job())
    if as_json:
        plain = {name: plan.model_dump(mode="json") for name, plan in prepared.plans.items()}
        print(json.dumps(plain, indent=2))
        return
    from rich.console import Console

    from fedmp.report import RunDirectory, plans_panel

    Console().print(plans_panel(prepared.plans))
    directory = RunDirectory.create(config.run_dir or "runs/plan")
    directory.write_plans(prepared.plans)
    for path in directory.write_pictures(plans=prepared.plans, clients=(), records=()):
        print(f"picture: {path}")
