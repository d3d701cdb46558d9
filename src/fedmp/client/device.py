"""The process of one device: join the client's pipeline, then train round after round until told to stop."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fedmp.client.federation import Federation, HttpFederation
from fedmp.client.training import LocalTrainer, LocalWork, throttled
from fedmp.data import Dataset
from fedmp.errors import DeadlineError, FederationError, FedmpError, RefusedError
from fedmp.pipeline import (
    BatchResult,
    DeviceRunner,
    DistributedTransport,
    RunnerOptions,
    host_rendezvous,
    join_rendezvous,
)
from fedmp.records import (
    Address,
    DeviceReport,
    FailureReport,
    Instruction,
    ProgressReport,
    Ready,
    TimedAction,
)
from fedmp.stages import Stage, StageBlueprint
from fedmp.tasks import Task
from fedmp.updates import difference, trained_names

__all__ = ["DeviceSpec", "run_device", "serve_job"]

_TIMELINE_STEP = 1
_PROGRESS_S = 0.5
_ROUND_IS_OVER = 409
_ANNOUNCE_S = 1.0


@dataclass(frozen=True)
class DeviceSpec:
    """Everything that a device needs to know.

    Attributes:
        url, token: of the coordinator, and this device's credential.
        client, device: names in the topology.
        rank: its number among the client's devices.
        placement: the stages of each of the client's devices.
        blueprints: of its own stages, in ascending order.
        dataset: the part of the client's data that its stages need: inputs for the first, targets for
            the last, None between.
        num_samples: of the client.
        task: the loss.
        work: what to do in a round.
        options: how to run the stages.
        keep_statistics_local: keep buffers between rounds and do not send them.
        record_timeline: measure the actions of one step in the device's first round.
        host: address at which the client's devices reach each other.
        backend: of torch.distributed.
        torch_device: "cpu", "cuda:0", ...
        num_threads: for torch on the CPU; 0 leaves torch's default.
        timeout_s: deadline of one transfer between devices.
        ready: what it tells a coordinator that does not know it; None where every coordinator does.
    """

    url: str
    token: str
    client: str
    device: str
    rank: int
    placement: tuple[tuple[int, ...], ...]
    blueprints: tuple[StageBlueprint, ...]
    dataset: Dataset | None
    num_samples: int
    task: Task
    work: LocalWork
    options: RunnerOptions = field(default_factory=RunnerOptions)
    keep_statistics_local: bool = False
    record_timeline: bool = False
    host: str = "127.0.0.1"
    backend: str = "gloo"
    torch_device: str = "cpu"
    num_threads: int = 1
    timeout_s: float = 60.0
    ready: Ready | None = None


def run_device(spec: DeviceSpec) -> int:
    """Run a device until the coordinator stops it.

    Returns:
        An exit code: 0 if all went well, 1 if the device had to give up; the coordinator was told why.
    """
    federation = HttpFederation(spec.url, spec.token)
    try:
        serve_job(spec, federation)
    except FedmpError as error:
        if isinstance(error, FederationError):  # the coordinator may not have heard of it
            print(f"fedmp device: {error}", flush=True)
        return 1
    return 0


def serve_job(spec: DeviceSpec, federation: Federation) -> Instruction:
    """Train a job's rounds until the coordinator ends the job.

    Returns:
        The instruction that ended it: "stop" or "next".

    Raises:
        FedmpError: the device had to give up; the coordinator was told why, if it could be reached.
    """
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    current = _CurrentRound()
    try:
        return _Device(spec, federation, current).run()
    except FedmpError as error:
        _give_up(federation, spec, current.number, type(error).__name__, str(error))
        raise
    except Exception as error:  # whatever it is, the coordinator must hear of it
        text = f"{type(error).__name__}: {error}"
        _give_up(federation, spec, current.number, "FederationError", text)
        raise FederationError(text) from error


class _CurrentRound:
    number = 0


class _Device:
    """A device at work: its stages, its pipeline, its data."""

    def __init__(self, spec: DeviceSpec, federation: Federation, current: _CurrentRound) -> None:
        self._spec = spec
        self._federation = federation
        self._current = current
        self._address: Address | None = None
        self._transport = self._join_pipeline()
        self._stages = [Stage(blueprint).materialize(spec.torch_device) for blueprint in spec.blueprints]
        self._timeline: list[TimedAction] = []
        self._trained_before = self._has_timeline = False
        self._runner = DeviceRunner(
            self._stages,
            spec.task,
            self._transport,
            device=spec.rank,
            placement=spec.placement,
            options=spec.options,
            device_name=spec.device,
        )
        self._trainer = LocalTrainer(
            self._runner,
            spec.work,
            client=spec.client,
            dataset=spec.dataset,
            num_samples=spec.num_samples,
        )

    def run(self) -> Instruction:
        """Ask what to do, do it, and again; returns the instruction that ends the job."""
        try:
            while (instruction := self._federation.instruction()).kind not in ("stop", "next"):
                if instruction.kind == "train":
                    self._current.number = instruction.round
                    self._train(instruction.round)
                elif instruction.kind == "join":
                    self._rejoin()
            return instruction
        finally:
            if self._transport is not None:
                self._transport.close()

    def _rejoin(self) -> None:
        """The coordinator was started anew and does not know us any more."""
        assert self._spec.ready is not None
        if self._spec.rank == 0 and self._address is not None:
            self._federation.publish_address(self._address)
        self._federation.ready(self._spec.ready)

    def _join_pipeline(self) -> DistributedTransport | None:
        """Meet the client's other devices; its first device hosts the rendezvous."""
        spec = self._spec
        if len(spec.placement) == 1:
            return None
        if spec.host in ("127.0.0.1", "::1", "localhost"):
            loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
            if loopback is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        if spec.rank == 0:
            rendezvous = host_rendezvous(spec.host, timeout_s=spec.timeout_s)
            address = Address(host=spec.host, port=rendezvous.port, secret=os.urandom(16).hex())
            self._federation.publish_address(address)
            announced: contextlib.AbstractContextManager[None] = _announced(self._federation, address)
        else:
            announced = contextlib.nullcontext()
            address = _find_address(spec, self._federation)
            rendezvous = join_rendezvous(address.host, address.port, timeout_s=spec.timeout_s)
        self._address = address
        with announced:
            return DistributedTransport(
                rendezvous,
                rank=spec.rank,
                world_size=len(spec.placement),
                prefix=f"fedmp/{spec.client}/{address.secret}",
                device=spec.torch_device,
                backend=spec.backend,
                timeout_s=spec.timeout_s,
                names=[_stages_text(own) for own in spec.placement],
            )

    def _train(self, round: int) -> None:
        before = self._pull(round)
        bytes_before = self._runner.bytes_sent
        evaluation = self._trainer.evaluate(round=round) if self._spec.work.evaluate_first else BatchResult()
        started_s = time.monotonic()
        result = self._trainer.train(round=round, on_step=self._step_watcher(round))
        update = difference(self._trained(), before)
        report = DeviceReport(
            num_examples=self._spec.work.num_examples(self._spec.num_samples),
            loss_sum=result.loss_sum,
            weight=result.weight,
            num_correct=result.num_correct,
            evaluation_loss_sum=evaluation.loss_sum,
            evaluation_weight=evaluation.weight,
            evaluation_correct=evaluation.num_correct,
            pipeline_bytes=self._runner.bytes_sent - bytes_before,
            train_s=time.monotonic() - started_s,
            timeline=tuple(
                (a.device, a.stage, a.kind, a.microbatch, a.start_s, a.stop_s) for a in self._timeline
            ),
            generation=self._address.generation if self._address else "",
        )
        self._timeline = []
        try:
            self._federation.push(round, update, report)
        except RefusedError as error:
            if error.status != _ROUND_IS_OVER:
                raise
            # an acknowledgement got lost and the round has closed since: its update was in

    def _pull(self, round: int) -> dict[str, torch.Tensor]:
        """Load the round's global stages; buffers that are kept local stay after the first round."""
        before = self._federation.pull(round)
        keeps = self._spec.keep_statistics_local and round > 1 and self._trained_before
        for stage in self._stages:
            state = stage.blueprint.state
            loaded = {name: before[name] for name in state}
            if keeps:
                kept = [name for name, spec in state.items() if spec.kind == "buffer"]
                loaded.update(zip(kept, stage.state_tensors(kept), strict=True))
            stage.load_state(loaded)
        self._trained_before = True
        return before

    def _trained(self) -> dict[str, torch.Tensor]:
        """What local training changed, each tensor from the stage that owns it."""
        trained: dict[str, torch.Tensor] = {}
        for stage in self._stages:
            owned = stage.owned_state()
            specs = [stage.blueprint.state[name] for name in owned]
            names = trained_names(specs, with_buffers=not self._spec.keep_statistics_local)
            trained.update({name: owned[name].cpu() for name in names})
        return trained

    def _step_watcher(self, round: int) -> Callable[[int, int, BatchResult], None]:
        """After each step: report progress now and then, and time the actions of one step."""
        spec = self._spec
        total = spec.work.num_examples(spec.num_samples)
        latest: list[ProgressReport] = []
        report = throttled(lambda: self._federation.progress(latest[-1]), _PROGRESS_S)
        steps = spec.work.num_steps(spec.num_samples)
        wanted = spec.record_timeline and not self._has_timeline
        self._has_timeline |= wanted
        timed_step = min(_TIMELINE_STEP, steps - 1)
        if wanted and timed_step == 0:
            self._runner.observe = self._timeline.append

        def watch(step: int, samples_done: int, sums: BatchResult) -> None:
            self._runner.observe = self._timeline.append if wanted and step + 1 == timed_step else None
            if spec.blueprints[-1].is_last:
                loss = sums.loss_sum / max(sums.weight, 1e-12)
                latest[:] = [
                    ProgressReport(round=round, samples_done=samples_done, samples_total=total, loss=loss)
                ]
                report()

        return watch


@contextlib.contextmanager
def _announced(federation: Federation, address: Address) -> Iterator[None]:
    """Say it again now and then: a coordinator that is started anew has forgotten it, and the others wait."""
    is_done = threading.Event()

    def announce() -> None:
        while not is_done.wait(_ANNOUNCE_S):
            with contextlib.suppress(FederationError):
                federation.publish_address(address)

    thread = threading.Thread(target=announce, name="fedmp-announce", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()


def _find_address(spec: DeviceSpec, federation: Federation) -> Address:
    deadline_s = time.monotonic() + spec.timeout_s
    while time.monotonic() < deadline_s:
        address = federation.address()
        if address is not None:
            return address
        time.sleep(0.05)
    raise DeadlineError(
        f"device {spec.device} of {spec.client}: the client's first device did not come up "
        f"within {spec.timeout_s:g} s"
    )


def _give_up(federation: Federation, spec: DeviceSpec, round: int, kind: str, message: str) -> None:
    if kind != "TrainingError":
        message = (
            f"device {spec.device} of {spec.client} ({_stages_text(spec.placement[spec.rank])}): {message}"
        )
    with contextlib.suppress(FederationError):
        federation.fail(FailureReport(kind=kind, message=message, round=round))


def _stages_text(stages: Sequence[int]) -> str:
    return f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
