"""The command line: `fedmp run`, `simulate` and `plan`, and those of a deployed federation.

Overrides are Hydra's. What goes wrong is one line on standard error and exit code 2.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial

from fedmp.cli import commands
from fedmp.cli.compose import describe_groups, groups

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 2 for anything that the user can mend, 130 after an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    by_name: dict[str, Callable[[list[str]], None]] = {
        "run": commands.run,
        "simulate": commands.simulate,
        "plan": commands.plan,
        "curves": commands.curves,
        "compare": commands.compare,
        "presets": commands.presets,
        "coordinator": commands.coordinator,
        "device": commands.device,
        **{name: partial(commands.administer, name) for name in _ADMINISTRATION},
    }
    if "--version" in arguments:
        from fedmp import __version__

        print(f"fedmp {__version__}")
        return 0
    if arguments[:1] and arguments[0] in _ADMINISTRATION:
        pass  # these parse their own arguments, --help included
    elif "--help" in arguments or "-h" in arguments or arguments[:1] == ["help"]:
        print(_HELP.format(groups=describe_groups(arguments)))
        return 0
    command = "run"
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        command = arguments.pop(0)
    if command not in by_name:
        return _fail(f"there is no command {command!r}; there are {', '.join(by_name)}, and `fedmp --help`")
    # threads that spin while they wait collapse as soon as another process wants their core
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, os.getcwd())  # a config may name the user's own modules
    try:
        by_name[command](arguments)
    except commands.Terminated:
        return _fail("terminated; nothing that was committed or acknowledged is lost", code=143)
    except KeyboardInterrupt:
        return _fail("interrupted; committed rounds are kept, go on with resume=DIR", code=130)
    except Exception as error:
        _end_by_itself()
        message = _message(error)
        if message is None:
            raise
        return _fail(message)
    return 0


def _end_by_itself() -> None:
    """Let each of several ranks end with its own message and exit code.

    torchrun sends SIGTERM to the others as soon as the first has ended, and those that are about to end as well would
    seem to have been killed, or be so before they have said why.
    """
    from fedmp.engine.ranks import place_in_environment

    if place_in_environment()[1] > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
        options = error.options or groups([]).get(group)  # Hydra has none where several may be chosen
        if options:
            return f"group {group} has no choice {choice!r}; there are {', '.join(options)}"
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
        return " ".join(str(error).split())
    return None


def _fail(message: str, *, code: int = 2) -> int:
    # in one piece, since ranks that fail together share a terminal; print writes the line's end by itself
    sys.stderr.write(f"fedmp: error: {message}\n")
    return code
