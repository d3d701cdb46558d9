"""The command line: `fedmp run`, `simulate` and `plan`, and those of a deployed federation.

Overrides are Hydra's. What goes wrong is one line on standard error and exit code 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmp.config import RunConfig

__all__ = ["main"]

_HELP = """\
fedmp: federated model-parallel training

usage:
  fedmp                          the quickstart: same as `fedmp run`
  fedmp run      [OVERRIDES]     train; by default coordinator and devices as real processes
  fedmp simulate [OVERRIDES]     train in one process: short for `fedmp run engine=simulate`
  fedmp plan     [OVERRIDES]     show how the model would be cut over each client's devices
                 --json          ... as JSON
  fedmp curves   [OVERRIDES]     how the result of experiment=paper depends on its assumptions; no training
  fedmp compare RUN_DIR...       runs side by side, as a table and a picture; --out DIR
  fedmp presets                  devices and links that a topology may name, with their sources
  fedmp coordinator [OVERRIDES]  serve the job to devices on other machines; again: go on where it ended
  fedmp device --credentials FILE [OVERRIDES]
                                 take part: the same job, this client's data
  fedmp certs    HOST...         make certificates for a coordinator; see each command's --help
  fedmp enroll   CLIENT/DEVICE.. make credentials for devices
  fedmp revoke   CLIENT[/DEVICE] take credentials back
  fedmp --version | --help

overrides (Hydra):
  GROUP=CHOICE                   pick a choice of a group, e.g. topology=uneven model=vit
  GROUP.FIELD=VALUE              set a field, e.g. optimizer.lr=0.1 strategy.local_epochs=2
  transforms=[topk,int8,zstd]    what happens to updates on their way, in order; downlink=[bf16] alike
  KEY=VALUE                      e.g. rounds=5 batch_size=64 seed=1 run_dir=out/try1
  resume=DIR                     go on with the run in DIR
  centralized=null               without centralized training to compare with
  --multirun A=1,2 B=x,y         run every combination
  --config-dir DIR               your own groups and choices, beside the built-in ones
  --cfg job                      print the composed config and stop

groups and choices:
{groups}

example:
  fedmp run topology=uneven partitioner=exact rounds=5 run_dir=out/uneven
"""

_ADMINISTRATION = ("certs", "enroll", "revoke")

_VALUE_FLAGS = {
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--cfg",
    "-c",
    "--package",
    "-p",
}

_PLAIN_FLAGS = {"--multirun", "-m", "--run", "-r", "--resolve", "--info", "-i", "--hydra-help"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 2 for anything that the user can mend, 130 after an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": _run,
        "simulate": _simulate,
        "plan": _plan,
        "curves": _curves,
        "compare": _compare,
        "presets": _presets,
        "coordinator": _coordinator,
        "device": _device,
        **{name: partial(_administer, name) for name in _ADMINISTRATION},
    }
    if "--version" in arguments:
        from fedmp import __version__

        print(f"fedmp {__version__}")
        return 0
    if arguments[:1] and arguments[0] in _ADMINISTRATION:
        pass  # these parse their own arguments, --help included
    elif "--help" in arguments or "-h" in arguments or arguments[:1] == ["help"]:
        print(_HELP.format(groups=_describe_groups(arguments)))
        return 0
    command = "run"
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        command = arguments.pop(0)
    if command not in commands:
        return _fail(f"there is no command {command!r}; there are {', '.join(commands)}, and `fedmp --help`")
    # threads that spin while they wait collapse as soon as another process wants their core
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, os.getcwd())  # a config may name the user's own modules
    try:
        commands[command](arguments)
    except _Terminated:
        return _fail("terminated; nothing that was committed or acknowledged is lost", code=143)
    except KeyboardInterrupt:
        return _fail("interrupted; committed rounds are kept, go on with resume=DIR", code=130)
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        return _fail(message)
    return 0


def _administer(name: str, arguments: list[str]) -> None:
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


def _run(arguments: list[str]) -> None:
    finished: list[Path] = []
    _compose(arguments, lambda config: finished.append(_run_config(config)))
    if len(finished) > 1:
        _show_comparison(finished, None)


def _simulate(arguments: list[str]) -> None:
    _run(["engine=simulate", *arguments])


def _plan(arguments: list[str]) -> None:
    as_json = "--json" in arguments
    _compose([argument for argument in arguments if argument != "--json"], lambda c: _show_plan(c, as_json))


def _compare(arguments: list[str]) -> None:
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


def _presets(arguments: list[str]) -> None:
    from rich.console import Console

    from fedmp.errors import ConfigError
    from fedmp.report.presets import presets_tables

    if arguments:
        raise ConfigError(f"`fedmp presets` takes no arguments, but has {' '.join(arguments)}")
    Console().print(presets_tables())


def _coordinator(arguments: list[str]) -> None:
    from fedmp.engine.deploy import DeployEngine
    from fedmp.errors import ConfigError
    from fedmp.report import LogView, configure_logs

    configs: list[RunConfig] = []
    _compose(["engine=deploy", *arguments], configs.append)
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


def _device(arguments: list[str]) -> None:
    from fedmp.engine.device import LocalJob, run_deployed_device
    from fedmp.report import configure_logs

    credentials, arguments = _take_credentials(arguments)
    configs: list[RunConfig] = []
    _compose(arguments, configs.append)
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


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _run_config(config: RunConfig) -> Path:
    """Run a job; returns its run directory."""
    if config.paper is not None:
        return _run_paper(config)
    from fedmp.report import LogView, configure_logs, make_view

    if config.logs:
        configure_logs(config.logs)
    with contextlib.nullcontext(LogView()) if config.logs else make_view(quiet=config.quiet) as view:
        result = config.job().run(
            config.make_engine(),
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


def _curves(arguments: list[str]) -> None:
    if not any(argument.startswith("experiment=") for argument in arguments):
        arguments = ["experiment=paper", *arguments]
    _compose(arguments, _show_curves)


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


def _compose(arguments: list[str], task: Callable[[RunConfig], None]) -> None:
    """Let Hydra compose the config of each job and run the task on it."""
    warnings.filterwarnings("ignore", module=r"torch\..*")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the error can be put into one line here
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from fedmp.config import config_dir, load_config

    failed: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def app(composed: DictConfig) -> None:
        if not failed:
            try:
                one_job(load_config(composed))
            except Exception as error:  # Hydra would print its own account of it first
                failed.append(error)

    def one_job(config: RunConfig) -> None:
        if HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN and config.run_dir is None:
            hydra_config = HydraConfig.get()
            folder = Path(hydra_config.sweep.dir) / str(hydra_config.job.num)
            print(f"[{hydra_config.job.num}] {' '.join(hydra_config.overrides.task)}", flush=True)
            config = config.model_copy(update={"run_dir": folder})
        task(config)

    kept = sys.argv
    sys.argv = ["fedmp", *_flags_first(_free_overrides(arguments))]
    try:
        app()
    finally:
        sys.argv = kept
    if failed:
        raise failed[0]


def _free_overrides(arguments: Sequence[str]) -> list[str]:
    """Let `group.field=value` set fields that no file names: Hydra wants `++` before those.

    Whether the field exists is then checked by the component itself, which knows.
    """
    groups = set(_groups(arguments))
    freed = []
    for index, argument in enumerate(arguments):
        match = re.match(r"([A-Za-z_][\w.]*)=", argument)
        is_value = index > 0 and arguments[index - 1] in _VALUE_FLAGS
        if match and not is_value and match[1] not in groups and not match[1].startswith("hydra"):
            argument = f"++{argument}"
        freed.append(argument)
    return freed


def _flags_first(arguments: Sequence[str]) -> list[str]:
    """Let flags stand between overrides: the parser that Hydra uses takes overrides in one piece only.

    Raises:
        ConfigError: there is no such flag.
    """
    from fedmp.errors import ConfigError

    flags, overrides = [], []
    for index, argument in enumerate(arguments):
        if index > 0 and arguments[index - 1] in _VALUE_FLAGS:
            flags.append(argument)
        elif argument.startswith("-"):
            if argument.partition("=")[0] not in _VALUE_FLAGS | _PLAIN_FLAGS:
                raise ConfigError(f"there is no option {argument!r}; see `fedmp --help`")
            flags.append(argument)
        else:
            overrides.append(argument)
    return [*flags, *overrides]


def _groups(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The choices of each group, of the built-in configs and the user's own."""
    here = Path(__file__).resolve().parent
    built_in = here / "configs" if (here / "configs").is_dir() else here.parents[1] / "configs"
    folders = [built_in]
    for index, argument in enumerate(arguments):
        if argument in ("--config-dir", "-cd") and index + 1 < len(arguments):
            folders.append(Path(arguments[index + 1]))
        elif argument.startswith("--config-dir="):
            folders.append(Path(argument.partition("=")[2]))
    groups: dict[str, list[str]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/*.yaml")):
            groups.setdefault(path.parent.name, []).append(path.stem)
    return groups


def _describe_groups(arguments: Sequence[str]) -> str:
    groups = _groups(arguments)
    width = max(map(len, groups), default=0)
    return "\n".join(f"  {name:<{width}}  {', '.join(choices)}" for name, choices in sorted(groups.items()))


def _message(error: BaseException) -> str | None:
    """What to tell the user of an error; None for one that is ours."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from fedmp.errors import FedmpError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FedmpError):
            return str(seen)
        seen = seen.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        options = error.options or _groups([]).get(group)  # Hydra has none where several may be chosen
        if options:
            return f"group {group} has no choice {choice!r}; there are {', '.join(options)}"
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
        return " ".join(str(error).split())
    return None


def _fail(message: str, *, code: int = 2) -> int:
    print(f"fedmp: error: {message}", file=sys.stderr)
    return code
