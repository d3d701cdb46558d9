"""A job: everything about a training, described once, whatever engine runs it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from fedmp.aggregate import Aggregator, WeightedMean
from fedmp.aggregate.aggregator import check_cohorts
from fedmp.attacks import Attack
from fedmp.clock import Clock
from fedmp.data import IID, ArrayData, DataSource, Split
from fedmp.errors import ConfigError
from fedmp.graph import CutRules, StateSpec
from fedmp.learning_rate import Constant, LearningRate
from fedmp.partition import Partitioner
from fedmp.partition.api import Costs
from fedmp.pipeline import PipelineSettings
from fedmp.records import Fault, Observer, Plan, RoundRecord, Summary
from fedmp.schedule import OneFOneB, PlacedSchedule, Schedule
from fedmp.strategy import FedAvg, Strategy
from fedmp.tasks import CrossEntropy, Task
from fedmp.topology import Topology
from fedmp.updates import Channel

__all__ = ["Centralized", "Engine", "Job", "OptimizerFactory", "Result", "default_optimizer"]

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


# a partial can be read without making an optimizer, which imports torch's compiler stack
default_optimizer: OptimizerFactory = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Centralized:
    """Centralized training to compare with: the same model on the pooled data of all clients.

    Attributes:
        optimizer: makes its optimizer, tuned for it and not for the federation.
        epochs: passes over the pooled data; None for as many as the federation makes.
        batch_size: samples a step; None for the clients' batch size.
    """

    optimizer: OptimizerFactory = default_optimizer
    epochs: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Job:
    """A federated model-parallel training.

    Args:
        model: a module, or a function that makes one; seeded by `seed` if a function.
        topology: clients, devices and links.
        data: a data source, or arrays (x_train, y_train, x_test, y_test).
        split: how the training samples are spread over the clients.
        task: what the model is trained for: the loss and what counts as correct.
        strategy: who takes part in a round and how much they train.
        aggregator: how the clients' updates become one.
        optimizer: makes the client optimizer of a list of parameters, such as
            `functools.partial(torch.optim.SGD, lr=0.1)`.
        learning_rate: how the client optimizer's rate changes over the run; holds for centralized
            training as well.
        transforms: of clients' updates on their way to the coordinator, in order, such as
            `(TopK(fraction=0.01), Int8(), Zstd())`; see `fedmp.updates`.
        downlink: of global stages on their way to the clients, such as `(BFloat16(),)`.
        server_optimizer: makes the optimizer that follows the pseudo-gradient; None averages.
        partitioner: "uniform", "balanced", "exact", or an object with a `plan` method.
        schedule: of the pipeline.
        pipeline: checkpointing, mixed precision and compression between a client's devices.
        cuts: where plans cut and where not, and which device runs what, by names of modules.
        costs: "flops" plans with estimated times of layers, "measured" with times taken on this machine.
        leaves: path patterns of modules that are not traced into.
        rounds: how many.
        batch_size: samples in one step of a client.
        num_microbatches: into which the pipeline cuts a batch.
        accumulate_batches: whose gradients a client adds up for one optimizer step.
        max_gradient_norm: clients clip the gradient of each step to this 2-norm over the whole model;
            None does not clip.
        seed: of every random choice.
        evaluate_every: rounds from one test of the global model on the held-out set to the next; the last
            round's is always tested.
        federated_evaluation: evaluate each round's starting model on the clients' own data.
        centralized: train centrally as well, to compare; None does not.
        trace: write a picture and a trace file of one measured step of each client; engine "local" only.
        faults: what shall go wrong with which device, to see what becomes of the training.
        attack: which clients shall attack the training and how, to see what the aggregator makes of it.
        clock: in which ways simulated time differs from an ideal world's; engine "simulate" only.

    Example:
        >>> job = Job(model=model, topology=topology, data=(x, y, x_test, y_test))  # doctest: +SKIP
        >>> result = job.run(engine="local")                                        # doctest: +SKIP
    """

    model: nn.Module | Callable[[], nn.Module]
    topology: Topology
    data: DataSource | tuple[Any, Any, Any, Any]
    split: Split = field(default_factory=IID)
    task: Task = field(default_factory=CrossEntropy)
    strategy: Strategy = field(default_factory=FedAvg)
    aggregator: Aggregator = field(default_factory=WeightedMean)
    optimizer: OptimizerFactory = default_optimizer
    learning_rate: LearningRate = field(default_factory=Constant)
    transforms: tuple[Any, ...] = ()
    downlink: tuple[Any, ...] = ()
    server_optimizer: OptimizerFactory | None = None
    partitioner: str | Partitioner = "balanced"
    schedule: Schedule | PlacedSchedule = field(default_factory=OneFOneB)
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    cuts: CutRules = field(default_factory=CutRules)
    costs: Costs = "flops"
    leaves: tuple[str, ...] = ()
    rounds: int = 10
    batch_size: int = 32
    num_microbatches: int = 4
    accumulate_batches: int = 1
    max_gradient_norm: float | None = None
    seed: int = 0
    evaluate_every: int = 1
    federated_evaluation: bool = False
    centralized: Centralized | None = None
    trace: bool = False
    faults: tuple[Fault, ...] = ()
    attack: Attack | None = None
    clock: Clock = field(default_factory=Clock)
    title: str = "fedmp"

    def __post_init__(self) -> None:
        for name in ("rounds", "batch_size", "num_microbatches", "accumulate_batches", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ConfigError(
                f"max_gradient_norm is {self.max_gradient_norm}; it must be above 0, or null for no clipping"
            )
        self.uplink_channel({})
        self.downlink_channel({})
        closing = self.strategy.closing(len(self.topology.clients))
        check_cohorts(self.aggregator, minimum=closing.minimum, wanted=closing.wanted)
        if self.attack is not None:
            self.attack.attackers([client.name for client in self.topology.clients], seed=self.seed)
        every = self.topology.clients if self.faults or self.clock.losses else ()
        devices = {f"{client.name}/{d.name}" for client in every for d in client.devices}
        named = [("faults", fault.device) for fault in self.faults]
        named += [("clock.losses", loss.device) for loss in self.clock.losses]
        for where, device in named:
            if device not in devices:
                near = difflib.get_close_matches(device, devices, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(devices)[:8])}"
                raise ConfigError(f"{where}: no device is called {device!r}; {hint}")
        for fault in self.faults:
            if fault.microbatch is not None and fault.microbatch >= self.num_microbatches:
                raise ConfigError(
                    f"faults: micro-batch {fault.microbatch} of {fault.device} never comes; "
                    f"there are {self.num_microbatches}, counted from 0"
                )

    def optimizer_copies(self) -> float:
        """State that the client optimizer keeps, in units of the parameters' size."""
        parameter = nn.Parameter(torch.zeros(64))
        parameter.grad = torch.ones(64)
        optimizer = self.optimizer([parameter])
        optimizer.step()
        state = optimizer.state.get(parameter, {}).values()
        held = sum(value.numel() for value in state if isinstance(value, torch.Tensor) and value.dim() > 0)
        return held / parameter.numel()

    def uplink_channel(self, specs: Mapping[str, StateSpec]) -> Channel:
        """How updates travel.

        Args:
            specs: of the tensors that may.

        Raises:
            ConfigError: `transforms` are not in order.
        """
        return Channel(self.transforms, specs, seed=self.seed)

    def downlink_channel(self, specs: Mapping[str, StateSpec]) -> Channel:
        """How global stages travel.

        Args:
            specs: of the tensors that may.

        Raises:
            ConfigError: `downlink` has what is not for global stages.
        """
        return Channel(self.downlink, specs, seed=self.seed, direction="down")

    def source(self) -> DataSource:
        """The data source, whichever way the data were given."""
        return ArrayData(*self.data) if isinstance(self.data, tuple) else self.data

    def run(
        self,
        engine: str | Engine = "local",
        *,
        run_dir: str | Path | None = None,
        resume: bool = False,
        observe: Observer | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Result:
        """Run the job.

        Args:
            engine: "local" (a process for the coordinator and each device), "simulate" (all in this
                process), or an engine object.
            run_dir: where the run leaves its files; None for `runs/` and the time.
            resume: go on with the run in `run_dir` after its last committed round.
            observe: told of everything that happens; None prints a line a round.
            config: written to `config.json`, for people.

        Returns:
            History, final model and summary.

        Raises:
            FedmpError: anything that fedmp can name; see `fedmp.errors`.
        """
        from fedmp.engine.run import run_job

        return run_job(self, engine, run_dir=run_dir, resume=resume, observe=observe, config=config or {})


@dataclass(frozen=True)
class Result:
    """What a run returns.

    Attributes:
        history: one record a round.
        model: the final global model, in eval mode, on the CPU.
        summary: the run in one record.
        plans: each client's plan.
        run_dir: where its files are.
    """

    history: tuple[RoundRecord, ...]
    model: nn.Module
    summary: Summary
    plans: Mapping[str, Plan]
    run_dir: Path


@runtime_checkable
class Engine(Protocol):
    """A way to run the rounds of a prepared job."""

    @property
    def name(self) -> str:
        """As summaries show it."""
        ...

    def warm_up(self) -> None:
        """Begin whatever takes long and needs nothing of the job."""
        ...

    def prepare(self, job: Job) -> Any:
        """The job, ready to run: a `Prepared`, of what this engine has at hand.

        Raises:
            FedmpError: the job cannot be prepared, or asks for what this engine cannot do.
        """
        ...

    def run(self, session: Any) -> Any:
        """Run the rounds of a `Session`; returns their `Outcome`."""
        ...
