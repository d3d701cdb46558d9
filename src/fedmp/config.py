"""From Hydra's composed YAML to a validated `RunConfig`, and from there to a `Job`.

YAML names choices; every default and every check of a hyper-parameter lives in the component that uses
it. The only other module that knows Hydra is the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from fedmp.engine import Centralized, Engine, Job
from fedmp.engine.device import DeviceSettings
from fedmp.errors import ConfigError, FedmpError
from fedmp.graph import CutRules
from fedmp.paper import PaperSettings
from fedmp.partition.api import Costs
from fedmp.pipeline import PipelineSettings
from fedmp.records import Fault
from fedmp.topology import Topology

__all__ = ["CentralizedConfig", "RunConfig", "config_dir", "load_config"]


class CentralizedConfig(BaseModel):
    """Centralized training to compare with.

    Attributes:
        optimizer: `_target_` and arguments of its optimizer.
        epochs: passes over the pooled data; null for as many samples as the federation processes.
        batch_size: null for the clients' batch size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: dict[str, Any]
    epochs: PositiveInt | None = None
    batch_size: PositiveInt | None = None

    def build(self) -> Centralized:
        """What the engines take."""
        optimizer = _factory("centralized.optimizer", self.optimizer)
        return Centralized(optimizer=optimizer, epochs=self.epochs, batch_size=self.batch_size)


class RunConfig(BaseModel):
    """A run as the command line describes it; written to `config.json`.

    The fields of the groups hold a `_target_`, the dotted path of a class, and its arguments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: dict[str, Any]
    data: dict[str, Any]
    split: dict[str, Any]
    topology: Topology
    task: dict[str, Any]
    partitioner: dict[str, Any]
    schedule: dict[str, Any]
    cuts: CutRules = CutRules()
    costs: Costs = "flops"
    leaves: tuple[str, ...] = ()
    strategy: dict[str, Any]
    aggregator: dict[str, Any]
    attack: dict[str, Any] | None = None
    optimizer: dict[str, Any]
    learning_rate: dict[str, Any]
    engine: dict[str, Any]
    clock: dict[str, Any] = Field(default_factory=lambda: {"_target_": "fedmp.clock.Clock"})
    title: str = "fedmp"
    rounds: PositiveInt
    batch_size: PositiveInt
    num_microbatches: PositiveInt
    accumulate_batches: PositiveInt = 1
    max_gradient_norm: PositiveFloat | None = None
    pipeline: PipelineSettings = PipelineSettings()
    seed: int = Field(ge=0)
    transforms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    downlink: dict[str, dict[str, Any]] = Field(default_factory=dict)
    server_optimizer: dict[str, Any] | None = None
    evaluate_every: PositiveInt = 1
    federated_evaluation: bool = False
    centralized: CentralizedConfig | None = None
    device: DeviceSettings = DeviceSettings()
    logs: Literal["text", "json"] | None = None
    run_dir: Path | None = None
    resume: Path | None = None
    trace: bool = False
    faults: tuple[Fault, ...] = ()
    paper: PaperSettings | None = None
    quiet: bool = False

    def job(self) -> Job:
        """The job that this config describes.

        Raises:
            ConfigError: a `_target_` or one of its fields is wrong.
        """
        central = self.centralized
        return Job(
            model=_factory("model", self.model),
            topology=self.topology,
            data=_component("data", self.data),
            split=_component("split", self.split),
            task=_component("task", self.task),
            strategy=_component("strategy", self.strategy),
            aggregator=_component("aggregator", self.aggregator),
            attack=_component("attack", self.attack) if self.attack else None,
            optimizer=_factory("optimizer", self.optimizer),
            learning_rate=_component("learning_rate", self.learning_rate),
            transforms=_chain("transforms", self.transforms),
            downlink=_chain("downlink", self.downlink),
            server_optimizer=(
                _factory("server_optimizer", self.server_optimizer) if self.server_optimizer else None
            ),
            partitioner=_component("partitioner", self.partitioner),
            schedule=_component("schedule", self.schedule),
            pipeline=self.pipeline,
            cuts=self.cuts,
            costs=self.costs,
            leaves=self.leaves,
            rounds=self.rounds,
            batch_size=self.batch_size,
            num_microbatches=self.num_microbatches,
            accumulate_batches=self.accumulate_batches,
            max_gradient_norm=self.max_gradient_norm,
            seed=self.seed,
            evaluate_every=self.evaluate_every,
            federated_evaluation=self.federated_evaluation,
            centralized=central.build() if central else None,
            trace=self.trace,
            faults=self.faults,
            clock=_component("clock", self.clock),
            title=self.title,
        )

    def make_engine(self) -> Engine:
        """The engine that this config names.

        Raises:
            ConfigError: its `_target_` or one of its fields is wrong.
        """
        return _component("engine", self.engine)  # type: ignore[no-any-return]


def config_dir() -> Path:
    """The folder of configs that came with fedmp: beside the package's modules, or of the checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parents[1] / "configs"


def load_config(composed: DictConfig) -> RunConfig:
    """Validate a composed config.

    Raises:
        ConfigError: a key is unknown, missing, or has a wrong value.
    """
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(_explain("", error, list(RunConfig.model_fields))) from error


def _component(name: str, fields: dict[str, Any]) -> Any:
    """Make the object that a group describes."""
    target = _target(name, fields)
    try:
        return instantiate(fields, _convert_="all")
    except InstantiationException as error:
        raise _as_config_error(name, target, error.__cause__ or error) from error


def _chain(group: str, members: dict[str, dict[str, Any]]) -> tuple[Any, ...]:
    """Make the objects of a group of which several are chosen, in the order in which they were."""
    for name, fields in members.items():
        if "_target_" not in fields:
            raise ConfigError(
                f"{group}.{name} is not chosen: say {group}=[{name}], with others in their order if there are more"
            )
    return tuple(_component(f"{group}.{name}", fields) for name, fields in members.items())


def _factory(name: str, fields: dict[str, Any]) -> Callable[..., Any]:
    """A function that makes the object that a group describes, perhaps with arguments in front."""
    target = _target(name, fields)
    arguments = {key: value for key, value in fields.items() if not key.startswith("_")}
    made: dict[str, Any] = instantiate(arguments, _convert_="all") if arguments else {}
    return _Named(name, partial(_locate(name, target), **made))


class _Named:
    """A factory whose errors name the config group it came from. Picklable."""

    def __init__(self, name: str, factory: partial[Any]) -> None:
        self._name = name
        self._factory = factory

    @property
    def factory(self) -> partial[Any]:
        """The class and its arguments."""
        return self._factory

    def __call__(self, *args: Any) -> Any:
        try:
            return self._factory(*args)
        except (TypeError, ValueError) as error:
            target = f"{self._factory.func.__module__}.{self._factory.func.__qualname__}"
            raise _as_config_error(self._name, target, error) from error


def _target(name: str, fields: dict[str, Any]) -> str:
    target = fields.get("_target_")
    if not isinstance(target, str):
        raise ConfigError(f"{name} needs a _target_, the dotted path of a class, but has {sorted(fields)}")
    return target


def _locate(name: str, target: str) -> Callable[..., Any]:
    try:
        found: Callable[..., Any] = get_object(target)
    except Exception as error:  # whatever importing the user's module raises
        raise _as_config_error(name, target, error) from error
    return found


def _as_config_error(name: str, target: str, error: BaseException) -> FedmpError:
    if isinstance(error, FedmpError):
        return error
    if isinstance(error, ValidationError):
        fields = list(getattr(_locate(name, target), "model_fields", {}))
        return ConfigError(_explain(f"{name}.", error, fields))
    text = " ".join(str(error).split())
    return ConfigError(f"{name} ({target}): {text[:400]}")


def _explain(prefix: str, error: ValidationError, known: list[str]) -> str:
    """The first of pydantic's complaints, in one line, with the value and what would be right."""
    first = error.errors()[0]
    where = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *outer, name = map(str, first["loc"])
        if outer:
            groups: dict[str, type[BaseModel]] = {"cuts": CutRules, "topology": Topology}
            groups["centralized"] = CentralizedConfig
            group = groups.get(prefix + ".".join(outer))
            known = list(group.model_fields) if group else []
        near = difflib.get_close_matches(name, known, 1)
        inside = prefix + "".join(f"{part}." for part in outer)
        hint = f"did you mean {inside}{near[0]}?" if near else f"there are {', '.join(known) or 'others'}"
        return f"unknown key {where}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where} is missing: {message}"
    if isinstance(first["input"], dict | list):
        return f"{where or 'config'}: {message}" if where else message
    return f"{where} is {first['input']!r}: {message}"
