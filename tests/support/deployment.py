"""A deployed federation on this machine: a coordinator and devices as processes that only share sockets."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedmp import Job
from fedmp.admin import certs
from fedmp.coordinator import Board, CheckpointStore, GlobalModel, Journal
from fedmp.engine.deploy import DeployEngine
from fedmp.engine.device import DeviceSettings, LocalJob, run_deployed_device
from fedmp.errors import FedmpError
from fedmp.identity import Credentials, CredentialStore
from fedmp.records import Event, Note
from tests.support.machines import Machines, enter

# every step of a round, as the method that does it, and whether the kill comes before or after it
STEPS: dict[str, tuple[type, str, str]] = {
    "before the journal is opened": (Journal, "open", "before"),
    "before the round is opened": (Board, "open_round", "before"),
    "after the round is opened": (Board, "open_round", "after"),
    "after a stage is written for a device": (Journal, "global_stage", "after"),
    "before an update is checked": (Journal, "accept", "before"),
    "after an update is in the journal, before it is acknowledged": (Journal, "accept", "after"),
    "after an update is noted": (Board, "reported", "after"),
    "after all have reported": (Board, "close_round", "before"),
    "before it is written down how the round closes": (Journal, "decide", "before"),
    "after it is written down how the round closes": (Journal, "decide", "after"),
    "after the round's model is kept for those who are late": (Journal, "seal", "after"),
    "before the global model moves": (GlobalModel, "apply", "before"),
    "after the global model moved": (GlobalModel, "apply", "after"),
    "before the commit": (CheckpointStore, "save", "before"),
    "after the commit": (CheckpointStore, "save", "after"),
    "after the journal is closed": (Journal, "close", "after"),
    "after the last round": (Board, "stop", "before"),
}


class Deployment:
    """Starts and ends processes; use it as a context manager.

    Args:
        folder: for everything.
        job: what all train.
        config: the same for all, to be compared.
        engine: further settings of the coordinator.
        settings: further settings of the devices.
        machines: of their own, where the coordinator is on "fed" and each device on that of its name; they
            speak TLS then.
    """

    def __init__(
        self,
        folder: Path,
        job: Job,
        config: Mapping[str, Any] | None = None,
        *,
        engine: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        machines: Machines | None = None,
    ) -> None:
        self._machines = machines
        self._more_engine = dict(engine or {})
        self._more_settings = dict(settings or {})
        self.folder = folder
        self.job = job
        self.config = dict(config or {"seed": job.seed})
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.host = machines.address("fed") if machines else "127.0.0.1"
        self.url = f"{'https' if machines else 'http'}://{self.host}:{self.port}"
        if machines:
            certs([self.host, "--folder", str(folder / "federation")])
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["fedmp.engine.preload"])
        self._processes: list[BaseProcess] = []
        store = CredentialStore(folder / "federation" / "devices.json")
        self.tokens = {
            (client.name, device.name): store.enroll(client.name, device.name)
            for client in job.topology.clients
            for device in client.devices
        }

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()

    @property
    def engine(self) -> DeployEngine:
        """The coordinator's."""
        usual = {"host": self.host, "port": self.port, "folder": self.folder / "federation", "farewell_s": 10}
        return DeployEngine(**{**usual, **self._more_engine})

    def coordinator(self, *, kill_at: str = "", fill_at: str = "", nth: int = 1) -> BaseProcess:
        """Start it; at the nth time that it comes to a step it kills itself, or its disk is full."""
        trap = (kill_at or fill_at, nth, _fill_disk if fill_at else _kill_itself)
        arguments = (self.job, self.engine, self.folder / "run", self.config, trap)
        return self._start("fed", _serve, arguments)

    def device(
        self, client: str, device: str, *, job: Job | None = None, config: Mapping[str, Any] | None = None
    ) -> BaseProcess:
        """Start a device."""
        path = self.folder / f"{client}.{device}.json"
        token = self.tokens[client, device]
        ca = (self.folder / "federation" / "ca.pem").read_text() if self._machines else None
        Credentials(client=client, device=device, token=token, coordinator=self.url, ca=ca).save(path)
        host = self._machines.address(device) if self._machines else "127.0.0.1"
        settings = DeviceSettings(
            **{
                "credentials": path,
                "state_folder": self.folder / "state",
                "num_threads": 1,
                "patience_s": 60,
                "transfer_timeout_s": 60,
                "host": host,
                **self._more_settings,
            }
        )
        return self._start(device, _take_part, (job or self.job, config or self.config, settings))

    def devices(self) -> list[BaseProcess]:
        """Start all of them."""
        return [self.device(client, device) for client, device in self.tokens]

    def last_words(self, client: str, device: str) -> str:
        """Why a device gave up."""
        return (self.folder / f"{client}.{device}.error").read_text()

    def final_state(self) -> dict[str, torch.Tensor]:
        """The global model after the last round."""
        return load_file(
            self.folder / "run" / "checkpoints" / f"round-{self.job.rounds:05d}" / "model.safetensors"
        )

    def notes(self) -> list[str]:
        """What the coordinator has told so far."""
        path = self.folder / "notes.txt"
        return path.read_text().splitlines() if path.exists() else []

    def get(self, path: str) -> Any:
        """What the service says of itself; None while it is away."""
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + path, timeout=5) as answer:
            return json.loads(answer.read())
        return None

    def _start(self, machine: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
        namespace = self._machines.namespace(machine) if self._machines else ""
        process = self._context.Process(target=_on, args=(namespace, target, arguments), daemon=True)
        process.start()
        self._processes.append(process)
        return process


def ends(process: BaseProcess, *, within_s: float = 60.0) -> int:
    """Its exit code, which must come."""
    process.join(within_s)
    assert process.exitcode is not None, "it did not end"
    return process.exitcode


@contextlib.contextmanager
def eventually(within_s: float = 30.0) -> Iterator[Callable[[], bool]]:
    """A clock for a loop: `while waiting(): ...`; fails when time is up."""
    deadline_s = time.monotonic() + within_s

    def waiting() -> bool:
        assert time.monotonic() < deadline_s, "time is up"
        time.sleep(0.01)
        return True

    yield waiting


def _serve(
    job: Job,
    engine: DeployEngine,
    run_dir: Path,
    config: Mapping[str, Any],
    trap: tuple[str, int, Callable[[], None]],
) -> None:
    torch.set_num_threads(1)
    if trap[0]:
        _set_trap(*trap)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resume = (run_dir / "checkpoints").is_dir()

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            with (run_dir.parent / "notes.txt").open("a") as file:
                file.write(f"{event.message}\n")

    try:
        job.run(engine, run_dir=run_dir, resume=resume, observe=observe, config=config)
    except FedmpError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (run_dir.parent / "coordinator.error").write_text(str(error))
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(143) from None


def _on(namespace: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if namespace:
        enter(namespace)
    target(*arguments)


def _take_part(job: Job, config: Mapping[str, Any], settings: DeviceSettings) -> None:
    assert settings.credentials is not None
    try:
        run_deployed_device([LocalJob(job, config)], settings)
    except FedmpError as error:
        settings.credentials.with_suffix(".error").write_text(str(error))
        raise SystemExit(2) from error


def _kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fill_disk() -> None:
    """From now on no file grows beyond what a note needs."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def _set_trap(step: str, nth: int, act: Callable[[], None]) -> None:
    owner, name, when = STEPS[step]
    original = getattr(owner, name)
    count, lock = 0, threading.Lock()

    def trapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if owner is CheckpointStore and args[1].round == 0:  # what a run begins with
            return original(*args, **kwargs)
        with lock:
            count += 1
            is_due = count == nth
        if is_due and when == "before":
            act()
        result = original(*args, **kwargs)
        if is_due:
            act()
        return result

    setattr(owner, name, trapped)
