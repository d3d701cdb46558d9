"""The process of one device: join the client's pipeline, then train round after round until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from fedmp.client.emulation import Emulation, SlowFederation, SlowTransport
from fedmp.client.exchange import Exchange, GuessedWrongError
from fedmp.client.federation import OTHER_PLAN, ROUND_IS_OVER, Federation, HttpFederation
from fedmp.client.local_round import LocalRound
from fedmp.client.meeting import Meeting, Place, meet, stages_text
from fedmp.client.sabotage import Saboteur
from fedmp.client.state import StateStore
from fedmp.client.training import throttled
from fedmp.client.wire import Wire
from fedmp.client.work import LocalWork
from fedmp.data import Dataset
from fedmp.errors import FederationError, FedmpError, PipelineError, RefusedError, TrainingError
from fedmp.pipeline import BatchResult, DeviceRunner, RunnerOptions, Transport, keep_near_plan
from fedmp.records import (
    DeviceReport,
    FailureReport,
    Fault,
    Instruction,
    ProgressReport,
    Ready,
    TimedAction,
    state_key,
)
from fedmp.stages import Stage, StageBlueprint
from fedmp.tasks import Task
from fedmp.updates import Channel

__all__ = ["DeviceSpec", "heartbeat", "run_device", "serve_job"]

_TIMELINE_STEP = 1
_PROGRESS_S = 0.5
_ASK_AGAIN_S = 0.05
_COPIES = 4  # of its tensors' bytes: a body may hold a strategy's slots beside them

_log = logging.getLogger("fedmp.device")


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
        uplink, downlink: how updates and global stages travel; None as they are.
        state_folder: where it keeps what its client needs from round to round; None keeps it in memory. Devices
            of a client that share the folder can take over each other's stages.
        record_timeline: measure the actions of one step in the device's first round.
        host: address at which the client's devices reach each other.
        backend: of torch.distributed.
        torch_device: "cpu", "cuda:0", ...
        num_threads: for torch on the CPU; 0 leaves torch's default.
        planned_bytes, memory_bytes: of memory for its stages, and of the device; on the CPU its process is kept
            near the first where the second is not much more.
        timeout_s: deadline of one transfer between devices.
        ready: what it tells a coordinator that does not know it; None where every coordinator does.
        plan: digest of the plan that all of this follows.
        process: names this process; empty for a name of its own.
        heartbeat_s: how often it tells that it is alive.
        faults: what shall go wrong on it.
        emulation: the slower device that it stands for; None for itself.
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
    uplink: Channel | None = None
    downlink: Channel | None = None
    state_folder: Path | None = None
    record_timeline: bool = False
    host: str = "127.0.0.1"
    backend: str = "gloo"
    torch_device: str = "cpu"
    num_threads: int = 1
    planned_bytes: int = 0
    memory_bytes: int = 0
    timeout_s: float = 60.0
    ready: Ready | None = None
    plan: str = ""
    process: str = ""
    heartbeat_s: float = 5.0
    faults: tuple[Fault, ...] = ()
    emulation: Emulation | None = None


def run_device(spec: DeviceSpec) -> int:
    """Run a device until the coordinator stops it.

    Returns:
        An exit code: 0 if all went well, 1 if the device had to give up; the coordinator was told why.
    """
    slow = spec.emulation
    federation = (
        SlowFederation(spec.url, spec.token, slow.uplink) if slow else HttpFederation(spec.url, spec.token)
    )
    try:
        serve_job(spec, federation)
    except FedmpError as error:
        if isinstance(error, FederationError):  # the coordinator may not have heard of it
            print(f"fedmp device: {error}", flush=True)
        return 1
    return 0


def serve_job(spec: DeviceSpec, federation: Federation) -> Instruction:
    """Train a job's rounds until the coordinator ends the job, or has a new plan for it.

    Returns:
        The instruction that ended it: "stop", "next", or "join" in another plan.

    Raises:
        FedmpError: the device had to give up; the coordinator was told why, if it could be reached.
    """
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    device: _Device | None = None
    try:
        with heartbeat(federation, spec.heartbeat_s):
            device = _Device(spec, federation)
            return device.run()
    except FedmpError as error:
        _report_failure(federation, spec, device.round if device else 0, error)
        raise
    except Exception as error:  # whatever it is, the coordinator must hear of it
        failure = FederationError(f"{type(error).__name__}: {error}")
        _report_failure(federation, spec, device.round if device else 0, failure)
        raise failure from error


@contextlib.contextmanager
def heartbeat(federation: Federation, interval_s: float) -> Iterator[None]:
    """Tell the coordinator now and then that this process is not hanging, whatever it waits for."""
    is_done = threading.Event()

    def beat() -> None:
        while not is_done.wait(interval_s):
            federation.beat()

    threading.Thread(target=beat, name="fedmp-heartbeat", daemon=True).start()
    try:
        yield
    finally:
        is_done.set()


class _Device:
    """A device at work: its stages, its pipeline, its data.

    Attributes:
        round: that it trains or trained last; 0 before the first.
    """

    def __init__(self, spec: DeviceSpec, federation: Federation) -> None:
        self._spec = spec
        self._federation = federation
        self.round = 0
        self._process = spec.process or os.urandom(8).hex()
        self._generation = -1
        self._meeting: Meeting | None = None
        if spec.torch_device == "cpu":
            keep_near_plan(spec.planned_bytes, spec.memory_bytes)
        self._stages = [Stage(blueprint).materialize(spec.torch_device) for blueprint in spec.blueprints]
        self._timeline: list[TimedAction] = []
        self._has_timeline = False
        self._store = StateStore(spec.state_folder)
        self._wire = Wire(
            spec.client,
            spec.uplink or Channel((), {}, seed=0),
            spec.downlink or Channel((), {}, seed=0, direction="down"),
        )
        self._pulled: tuple[int, dict[str, torch.Tensor]] = (0, {})
        self._runner: DeviceRunner | None = None
        self._saboteur = Saboteur(spec.faults) if spec.faults else None

    def run(self) -> Instruction:
        """Ask what to do, do it, and again; returns the instruction that ends the job, or its plan."""
        try:
            while not self._is_over(instruction := self._ask()):
                if instruction.kind == "train":
                    self._try(instruction)
                elif instruction.kind == "join":
                    self._rejoin()
            return instruction
        finally:
            self._leave()

    def _is_over(self, instruction: Instruction) -> bool:
        """Whether there is nothing more to do for these stages."""
        if instruction.kind == "join":
            return instruction.plan != self._spec.plan
        return instruction.kind in ("stop", "next")

    def _ask(self) -> Instruction:
        return self._federation.instruction(self._process)

    def _try(self, instruction: Instruction) -> None:
        """Train a round; if the pipeline breaks, say so, and ask again."""
        self.round = instruction.round
        try:
            if self._saboteur is not None:
                self._saboteur.begin(instruction.round, instruction.attempt)
            if self._runner is None or instruction.generation > self._generation:
                self._meet(instruction.generation)
            self._train(instruction.round, instruction.state)
        except _GenerationIsOverError:
            self._leave()
        except RefusedError as error:
            if error.status != ROUND_IS_OVER:
                raise
            # the round was closed without this client, or an acknowledgement got lost and its update was in
        except GuessedWrongError:
            pass  # what it says instead is asked for again
        except PipelineError as error:
            self._break_off(error)
            self._wait_for_news()

    def _break_off(self, error: PipelineError) -> None:
        """Leave a broken pipeline, so that the neighbours notice, and tell the coordinator meanwhile."""
        told = threading.Thread(
            target=_report_failure,
            args=(self._federation, self._spec, self.round, error, max(self._generation, 0)),
            name="fedmp-failure",
            daemon=True,
        )
        told.start()
        self._leave()
        told.join()

    def _wait_for_news(self) -> None:
        """Until the coordinator has another instruction than the one that failed."""
        while True:
            instruction = self._ask()
            if instruction.kind != "train" or instruction.generation > self._generation:
                return
            time.sleep(_ASK_AGAIN_S)

    def _rejoin(self) -> None:
        """The coordinator was started anew and does not know us any more."""
        assert self._spec.ready is not None
        try:
            if self._spec.rank == 0 and self._meeting is not None:
                self._federation.publish_address(self._meeting.address)
            self._federation.ready(self._spec.ready)
        except RefusedError as error:
            if error.reason != OTHER_PLAN:
                raise
            # another one since it was asked; the next instruction names it

    def _meet(self, generation: int) -> None:
        """Bring the pipeline up with the client's other devices."""
        spec = self._spec
        self._leave()
        self._generation = generation
        transport: Transport | None = None
        if len(spec.placement) > 1:
            place = Place(
                spec.client,
                spec.device,
                spec.rank,
                spec.placement,
                spec.host,
                spec.backend,
                spec.torch_device,
                spec.timeout_s,
            )
            if self._saboteur is not None:
                self._saboteur.at("meet")
            self._meeting = meet(place, self._federation, generation, check=self._check_generation)
            transport = self._meeting.transport
            self._generation = self._meeting.address.number
            if self._saboteur is not None:
                transport = self._saboteur.wrap(transport)
            if spec.emulation is not None:
                transport = SlowTransport(transport, spec.emulation.links)
        if self._runner is not None:
            self._runner.reconnect(transport)
            return
        self._runner = DeviceRunner(
            self._stages,
            spec.task,
            transport,
            device=spec.rank,
            placement=spec.placement,
            options=spec.options,
            device_name=spec.device,
        )
        self._local = LocalRound(
            self._runner,
            spec.work,
            client=spec.client,
            dataset=spec.dataset,
            num_samples=spec.num_samples,
        )

    def _check_generation(self, generation: int) -> None:
        instruction = self._ask()
        is_over = self._is_over(instruction)
        if instruction.kind == "join" and not is_over:
            self._rejoin()
        elif is_over or (instruction.kind == "train" and instruction.generation > generation):
            raise _GenerationIsOverError(f"generation {generation} is over")

    def _leave(self) -> None:
        """Leave the pipeline, whatever is under way."""
        if self._meeting is not None:
            self._meeting.transport.close()
            self._meeting = None

    def _train(self, round: int, base: str) -> None:
        """Train a round from the state that the coordinator names, and begin with the next as far as it may."""
        exchange: Exchange | None = None
        try:
            while True:
                push, key = self._train_one(round, base, exchange)
                if not self._goes_on(round):
                    return push()
                round, base = round + 1, key
                exchange = Exchange(
                    push,
                    ask=self._ask,
                    is_expected=partial(self._is_next, round, key),
                    pull=partial(self._pull, round, whole=False),
                )
        finally:
            if exchange is not None:
                exchange.abandon()

    def _goes_on(self, round: int) -> bool:
        """Whether the next round's first steps need nothing of the coordinator."""
        work = self._spec.work
        return work.scope.delay_steps > 0 and round < work.num_rounds and self._saboteur is None

    def _is_next(self, round: int, key: str, instruction: Instruction) -> bool:
        """Whether the coordinator lets this device go on with a round as it has begun it."""
        return (
            instruction.kind == "train"
            and (instruction.round, instruction.state) == (round, key)
            and instruction.generation <= self._generation
        )

    def _train_one(self, round: int, base: str, exchange: Exchange | None) -> tuple[Callable[[], None], str]:
        """Train a round; returns how to hand its update in, and the key of the state that it left.

        Args:
            round: its number.
            base: key of the state to start from.
            exchange: brings what the coordinator hands out, once that is needed; None if it is to be pulled first.
        """
        assert self._runner is not None
        self.round = round
        client, generation = self._spec.client, self._meeting.address.generation if self._meeting else ""
        kept = self._store.load(client, base, wanted=self._local.concerns)
        if base and self._keeps_state and not kept:
            _log.warning("what %s kept of round %s is not here; it begins anew", client, base)
        state = self._local.usable(kept, key=base, round=round)
        pulled = exchange.result if exchange else self._pull(round, whole=self._local.needs_whole(state))
        bytes_before = self._runner.bytes_sent
        result = self._local.run(pulled, state, round=round, on_step=self._step_watcher(self._runner, round))
        report = result.report.model_copy(
            update={
                "pipeline_bytes": self._runner.bytes_sent - bytes_before,
                "timeline": tuple(
                    (a.device, a.stage, a.kind, a.microbatch, a.start_s, a.stop_s) for a in self._timeline
                ),
                "generation": generation,
                "forgotten": self._wire.forgotten(result.update, kept) if base else (),
            }
        )
        self._has_timeline |= bool(self._timeline)
        self._timeline = []
        payload, sent = self._wire.pack(
            result.update, kept, round=round, sum_over_devices=partial(self._sum_over_devices, round)
        )
        # before the update is handed in: once that counts, the next round starts from this
        key = state_key(round, generation)
        self._store.save(client, key, self._spec.device, {**result.state, **sent}, base=base)
        return partial(self._push, round, payload, report), key

    @property
    def _keeps_state(self) -> bool:
        work = self._spec.work
        has_slots = bool(work.rule and work.rule.kept)
        return work.keeps_optimizer or work.scope.keeps_values or has_slots or self._wire.keeps_state

    def _sum_over_devices(self, round: int, own: float) -> float:
        assert self._runner is not None
        numbers = dict.fromkeys(self._spec.placement[self._spec.rank], 0.0)
        numbers[next(iter(numbers))] = own
        return self._runner.sum_over_stages(numbers, round=round)

    def _push(self, round: int, payload: dict[str, torch.Tensor], report: DeviceReport) -> None:
        push = partial(self._federation.push, round, report=report, zstd=self._wire.uplink.chain.zstd)
        fault = self._saboteur.at("push") if self._saboteur is not None else None
        if self._saboteur is not None and fault is not None and fault.kind == "corrupt":
            with contextlib.suppress(RefusedError):
                push(payload=self._saboteur.spoil(payload))
        push(payload=payload)
        if fault is not None and fault.kind == "drop":  # its acknowledgement: it is sent again
            push(payload=payload)

    def _pull(self, round: int, *, whole: bool) -> dict[str, torch.Tensor]:
        """The round's global stages."""
        if self._saboteur is not None:
            self._saboteur.at("pull")
        tensors = [tensor for blueprint in self._spec.blueprints for tensor in blueprint.state.values()]
        max_bytes = _COPIES * sum(tensor.num_bytes + 1024 for tensor in tensors)
        held, before = self._pulled
        held = held if held == round - 1 else 0
        payload = self._federation.pull(round, whole=whole, held=held, max_bytes=max_bytes)
        pulled = self._wire.unpack(payload, round=round, held=before)
        if self._wire.downlink.chain.keeps_estimate:
            self._pulled = round, pulled
        return pulled

    def _step_watcher(self, runner: DeviceRunner, round: int) -> Callable[[int, int, BatchResult], None]:
        """After each step: report progress now and then, and time the actions of one step."""
        spec = self._spec
        work = spec.work.of_round(spec.client, round)
        total = work.num_examples(spec.num_samples)
        latest: list[ProgressReport] = []

        def tell() -> None:
            goes_on = self._federation.progress(latest[-1])
            if not goes_on and latest[-1].samples_done < total:
                # the other devices notice that this one leaves the pipeline, and all meet again for the next round
                raise PipelineError(f"round {round} was closed without {spec.client}")

        report = throttled(tell, _PROGRESS_S)
        steps = work.num_steps(spec.num_samples)
        wanted = spec.record_timeline and not self._has_timeline
        self._timeline = []
        timed_step = min(_TIMELINE_STEP, steps - 1)
        saboteur = self._saboteur
        usual = saboteur.observer() if saboteur is not None else None
        runner.observe = self._timeline.append if wanted and timed_step == 0 else usual

        def watch(step: int, samples_done: int, sums: BatchResult) -> None:
            runner.observe = self._timeline.append if wanted and step + 1 == timed_step else usual
            if saboteur is not None:
                saboteur.at("between")
                saboteur.step = step + 1
            if spec.blueprints[-1].is_last:
                loss = sums.loss_sum / max(sums.weight, 1e-12)
                latest[:] = [
                    ProgressReport(round=round, samples_done=samples_done, samples_total=total, loss=loss)
                ]
                report()

        return watch


class _GenerationIsOverError(PipelineError):
    """The coordinator has told of another one."""


def _report_failure(
    federation: Federation, spec: DeviceSpec, round: int, error: FedmpError, generation: int = 0
) -> None:
    message = str(error)
    if not isinstance(error, TrainingError):
        message = (
            f"device {spec.device} of {spec.client} ({stages_text(spec.placement[spec.rank])}): {message}"
        )
    report = FailureReport(kind=type(error).__name__, message=message, round=round, generation=generation)
    with contextlib.suppress(FederationError):
        federation.fail(report)
