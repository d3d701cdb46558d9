"""From a job to everything that its rounds need: graph, plans, each client's data, predictions."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fedmp.cohort import Probe
from fedmp.data import Dataset, Rows, TrainTest, describe
from fedmp.engine.attacked import poisoned
from fedmp.engine.client_plan import set_up_client
from fedmp.engine.fit import check_fit
from fedmp.engine.job import Job
from fedmp.engine.population import MANY_CLIENTS, Population, set_up_groups
from fedmp.engine.setup import ClientSetup
from fedmp.errors import ConfigError
from fedmp.graph import LayerGraph, StateSpec, trace
from fedmp.records import ClientData, Plan
from fedmp.seeds import derive_seed
from fedmp.stages import StageBlueprint, draw_blueprints, model_state
from fedmp.strategy import Scope

__all__ = [
    "Prepared",
    "build_model",
    "example_input",
    "load_and_split",
    "plan_split",
    "prepare",
    "prepare_without_clients_data",
    "scope_of",
    "trace_model",
    "who_has_what",
]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A job, ready to run.

    Attributes:
        job: the job.
        model: its model with the initial weights.
        graph: the traced model.
        data: training and test samples; where the clients' data are elsewhere, those of the coordinator.
        clients: by name, in the topology's order.
        table: who holds what; empty where that is not known.
        sample_shape, sample_dtype: of one model input.
        scope: what of the model travels.
        notes: what the user should be told before the first round.
        probe: how clients can be trained many at once in this process; None where they are not.
    """

    job: Job
    model: nn.Module
    graph: LayerGraph
    data: TrainTest
    clients: Mapping[str, ClientSetup]
    table: tuple[ClientData, ...]
    sample_shape: tuple[int, ...]
    sample_dtype: torch.dtype
    scope: Scope = field(default_factory=Scope)
    notes: tuple[str, ...] = ()
    probe: Probe | None = None

    @property
    def is_traced(self) -> bool:
        """Whether the model was traced."""
        return True

    @property
    def specs(self) -> Mapping[str, StateSpec]:
        """Of the model's tensors, by canonical name."""
        return self.graph.state

    @property
    def fingerprint(self) -> str:
        """Of the model's modules and tensors, as they print: tells models apart, for checkpoints.

        It needs no trace, so that a run can be resumed with a plan or without.
        """
        tensors = sorted(f"{spec.name} {tuple(spec.shape)} {spec.dtype}" for spec in self.specs.values())
        return hashlib.sha256("\n".join([repr(self.model), *tensors]).encode()).hexdigest()[:16]

    @property
    def num_clients(self) -> int:
        """Clients of the job."""
        return len(self.clients)

    @property
    def num_devices(self) -> int:
        """Devices that train, of all clients."""
        if isinstance(self.clients, Population):
            return self.clients.num_devices
        return sum(setup.plan.num_devices for setup in self.clients.values())

    def initial_state(self) -> dict[str, torch.Tensor]:
        """The model's own tensors by canonical name: its initial weights."""
        return model_state(self.model, self.graph)

    @property
    def plans(self) -> dict[str, Plan]:
        """Each client's plan; of a large population each kind's."""
        if isinstance(self.clients, Population):
            return self.clients.plans
        return {name: setup.plan for name, setup in self.clients.items()}

    @property
    def has_clients_data(self) -> bool:
        """Whether the clients' samples are in this process."""
        return isinstance(self.clients, Population)

    def whole_stage(self) -> StageBlueprint:
        """The model as a single stage."""
        return draw_blueprints(self.graph, [], device=torch.device("cpu"))[0]


def prepare(job: Job) -> Prepared:
    """Load and split the data, build and trace the model, plan every client.

    Raises:
        ConfigError: the model does not fit the data.
        DataError, TraceError, PlanError: as named.
    """
    data, rows = load_and_split(job)
    model = build_model(job)
    check_fit(model, job.task, data.train, rows[0])
    return plan_split(job, model, data, rows)


def load_and_split(job: Job) -> tuple[TrainTest, Rows]:
    """The data, and each client's rows of the training set.

    Raises:
        DataError: the data cannot be loaded or split.
    """
    data, names = job.source().load(), job.topology.clients.names
    parts = job.split.assign(data.train, len(names), derive_seed(job.seed, "split") % 2**32)
    rows = Rows.checked(parts, names, num_rows=len(data.train))
    return replace(data, train=poisoned(job.attack, data.train, rows, names, seed=job.seed)), rows


def plan_split(job: Job, model: nn.Module, data: TrainTest, rows: Rows) -> Prepared:
    """Trace the model and plan every client, whose samples are known.

    Raises:
        TraceError, PlanError: as named.
    """
    planned = _plan_clients(job, model, data)
    clients = Population(job.topology.clients, planned.setups, data.train, rows)
    return replace(planned.prepared, clients=clients, table=who_has_what(clients, data.train, rows))


def who_has_what(clients: Population, train: Dataset, rows: Rows) -> tuple[ClientData, ...]:
    """Each client's samples, for reports; nothing of a large population."""
    return describe(train, rows, clients.names) if len(clients) <= MANY_CLIENTS else ()


def prepare_without_clients_data(job: Job) -> Prepared:
    """What a coordinator can prepare: its own data tell what a sample looks like, and are for evaluation.

    Raises:
        ConfigError: the job is to be attacked, with real clients.
        DataError, TraceError, PlanError: as named.
    """
    if job.attack is not None:
        raise ConfigError(
            "attacks are simulated, not made on clients elsewhere; use engine=simulate or local"
        )
    planned = _plan_clients(job, build_model(job), job.source().load())
    everyone = job.topology.clients
    clients = {
        client.name: replace(planned.setups[everyone.group(place)], client=client)
        for place, client in enumerate(everyone)
    }
    return replace(planned.prepared, clients=clients)


def trace_model(job: Job, model: nn.Module, example: torch.Tensor) -> LayerGraph:
    """Trace a job's model; torch's own account of what it cannot trace is kept from the terminal.

    Raises:
        TraceError: as named.
    """
    with _quiet_torch():
        return trace(model, (example,), leaves=job.leaves, cut_rules=job.cuts)


def build_model(job: Job) -> nn.Module:
    """The job's model with its initial weights, which its seed decides."""
    if isinstance(job.model, nn.Module):
        return copy.deepcopy(job.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(job.seed, "weights"))
        return job.model()


def scope_of(job: Job, specs: Mapping[str, StateSpec]) -> Scope:
    """What of a model travels.

    Raises:
        ConfigError: the strategy does not fit the model or the downlink.
    """
    scope = job.strategy.scope(specs)
    if scope.fragments and job.downlink_channel({}).chain.keeps_estimate:
        raise ConfigError(
            f"downlink: EF21 sends differences to the round before, of which {type(job.strategy).__name__}'s clients "
            f"have one of {len(scope.fragments)} fragments; leave ef21 out of downlink"
        )
    return scope


@dataclass(frozen=True, eq=False)
class _Planned:
    """A job without its clients, and for each group of them one that is like them."""

    prepared: Prepared
    setups: Sequence[ClientSetup]


def _plan_clients(job: Job, model: nn.Module, data: TrainTest) -> _Planned:
    example = example_input(data.train, job.batch_size)
    graph = trace_model(job, model, example)
    scope = scope_of(job, graph.state)
    prepared = Prepared(
        job=job,
        model=model,
        graph=graph,
        data=data,
        clients={},
        table=(),
        sample_shape=tuple(example.shape[1:]),
        sample_dtype=example.dtype,
        scope=scope,
    )
    setups = set_up_groups(job.topology.clients, lambda client: set_up_client(job, graph, model, client))
    return _Planned(prepared, setups)


def example_input(data: Dataset, batch_size: int) -> torch.Tensor:
    """A batch of inputs to trace with: as large as any will be, whatever samples there are."""
    assert data.inputs is not None
    return replace(
        data,
        inputs=data.inputs.new_zeros((batch_size, *data.inputs.shape[1:])),
        targets=None,
        users=None,
    ).input_batch(range(batch_size))


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch prints the graph so far when it cannot go on; our error says it in one line."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
