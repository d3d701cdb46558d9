"""The processes that devices run in on this machine, one of them started ahead of need.

To fork a process and bring it as far as `run_device` takes longer than all the rest of a recovery, so one spare
process stands by, and becomes the device that is lost next.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from fedmp.client import DeviceSpec, run_device
from fedmp.engine.sentinels import Sentinels

__all__ = ["DeviceProcesses"]

# not while the devices themselves come up, and not at all in a run that is over soon
_SPARE_AFTER_S = 1.0


@dataclass(frozen=True)
class _Spare:
    process: BaseProcess
    tell: Connection


class DeviceProcesses:
    """Starts device processes.

    Args:
        with_spare: keep a spare process.
        on_end: called, in another thread, when a device's process ends; must not block.
    """

    def __init__(self, *, with_spare: bool, on_end: Callable[[], None] = lambda: None) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._with_spare = with_spare
        self._spare: _Spare | None = None
        self._sentinels = Sentinels(on_end)
        self._started_s = time.monotonic()

    def start(self, name: str, spec: DeviceSpec) -> BaseProcess:
        """Start a device; in the spare process, if there is one."""
        self._started_s = time.monotonic()
        process = self._become(name, spec)
        self._sentinels.watch(process)
        return process

    def stand_by(self) -> None:
        """See that there is a spare process; called now and then."""
        if self._with_spare and self._spare is None and time.monotonic() > self._started_s + _SPARE_AFTER_S:
            listen, tell = self._context.Pipe(duplex=False)
            process = self._context.Process(
                target=_spare_main, args=(listen,), name="spare device", daemon=True
            )
            process.start()
            listen.close()
            self._spare = _Spare(process, tell)

    def close(self) -> None:
        """End the spare process, and watch the others no more."""
        self._sentinels.close()
        spare, self._spare = self._spare, None
        if spare is not None:
            _dismiss(spare)

    def _become(self, name: str, spec: DeviceSpec) -> BaseProcess:
        spare, self._spare = self._spare, None
        if spare is not None and _becomes(spare, name, spec):
            spare.process.name = name
            return spare.process
        process = self._context.Process(target=_device_main, args=(spec,), name=name, daemon=True)
        process.start()
        return process


def _becomes(spare: _Spare, name: str, spec: DeviceSpec) -> bool:
    """Let the spare process be this device; False if it is gone, too."""
    try:
        spare.tell.send((name, spec))
    except (OSError, pickle.PicklingError):
        _dismiss(spare)
        return False
    spare.tell.close()
    return True


def _dismiss(spare: _Spare) -> None:
    spare.tell.close()
    spare.process.kill()
    spare.process.join()
    spare.process.close()


def _device_main(spec: DeviceSpec) -> None:
    _follow_parent()
    raise SystemExit(run_device(spec))


def _spare_main(listen: Connection) -> None:
    _follow_parent()
    try:
        name, spec = listen.recv()
    except EOFError:
        return
    listen.close()
    multiprocessing.current_process().name = name
    raise SystemExit(run_device(spec))


def _follow_parent() -> None:
    # an interrupt at the terminal is the parent's to handle: it stops its devices in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="fedmp-parent", daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its devices, so they watch for its end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
