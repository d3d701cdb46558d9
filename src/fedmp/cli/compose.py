"""Composing a command's config: Hydra, with its overrides and flags made easier to give."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmp.config import RunConfig

__all__ = ["compose", "describe_groups", "groups"]

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


def compose(arguments: list[str], task: Callable[[RunConfig], None]) -> None:
    """Let Hydra compose the config of each job and run the task on it.

    Raises:
        ConfigError: an option or a field is unknown, or has a wrong value.
        HydraException: a choice or an override cannot be composed.
        Exception: what the task raises.
    """
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
    names = set(groups(arguments))
    freed = []
    for index, argument in enumerate(arguments):
        match = re.match(r"([A-Za-z_][\w.]*)=", argument)
        is_value = index > 0 and arguments[index - 1] in _VALUE_FLAGS
        if match and not is_value and match[1] not in names and not match[1].startswith("hydra"):
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


def groups(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The choices of each group, of the built-in configs and the user's own."""
    here = Path(__file__).resolve().parents[1]
    built_in = here / "configs" if (here / "configs").is_dir() else here.parents[1] / "configs"
    folders = [built_in]
    for index, argument in enumerate(arguments):
        if argument in ("--config-dir", "-cd") and index + 1 < len(arguments):
            folders.append(Path(arguments[index + 1]))
        elif argument.startswith("--config-dir="):
            folders.append(Path(argument.partition("=")[2]))
    found: dict[str, list[str]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/*.yaml")):
            found.setdefault(path.parent.name, []).append(path.stem)
    return found


def describe_groups(arguments: Sequence[str]) -> str:
    """The groups and their choices, a line each."""
    found = groups(arguments)
    width = max(map(len, found), default=0)
    return "\n".join(f"  {name:<{width}}  {', '.join(choices)}" for name, choices in sorted(found.items()))
