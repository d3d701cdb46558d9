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

from fedmp.client import LocalWork
from fedmp.clock import DeviceWork
from fedmp.cohort import Probe
from fedmp.data import Dataset, Rows, TrainTest, describe
from fedmp.engine.attacked import poisoned
from fedmp.engine.fit import check_fit
from fedmp.engine.job import Job
from fedmp.engine.population import MANY_CLIENTS, Population, set_up_groups
from fedmp.engine.setup import ClientSetup, Piece, received_names, shared_names
from fedmp.errors import ConfigError, PlanError
from fedmp.graph import LayerGraph, StateSpec, trace
from fedmp.partition.api import plan_graph
from fedmp.records import ClientData, Plan
from fedmp.schedule import PlacedSchedule, Schedule, placed_schedule_by_name, schedule_by_name
from fedmp.seeds import derive_seed
from fedmp.stages import StageBlueprint, draw_blueprints, model_state
from fedmp.strategy import Scope
from fedmp.topology import Client, Device

__all__ = [
    "ClientSetup",
    "Prepared",
    "build_model",
    "cut_by",
    "example_input",
    "load_and_split",
    "named_in_errors",
    "part_of",
    "plan_anew",
    "plan_split",
    "prepare",
    "prepare_without_clients_data",
    "scope_of",
    "set_up_client",
    "trace_model",
    "who_has_what",
    "with_plan",
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


def plan_anew(prepared: Prepared, setup: ClientSetup, devices: Sequence[Device]) -> ClientSetup:
    """Cut the model over the devices of a client that are left.

    Raises:
        PlanError: no plan fits them.
    """
    client = setup.client.model_copy(update={"devices": tuple(devices)})
    return cut_by(prepared, setup, _plan(prepared.job, prepared.graph, prepared.model, client), devices)


def cut_by(prepared: Prepared, setup: ClientSetup, plan: Plan, devices: Sequence[Device]) -> ClientSetup:
    """Cut a client's model by a plan over these of its devices.

    Raises:
        PlanError: the plan's placement is not its schedule's.
    """
    blueprints = draw_blueprints(prepared.graph, plan.cuts, device=torch.device("cpu"))
    return replace(
        setup,
        client=setup.client.model_copy(update={"devices": tuple(devices)}),
        plan=plan,
        pieces=blueprints,
        moved=moved_bytes(prepared.job, prepared.specs, setup.work, plan, blueprints),
        work=local_work(prepared.job, plan, setup.work.scope),
        num_samples=0 if setup.rows is None else len(setup.rows),
    )


def set_up_client(job: Job, graph: LayerGraph, model: nn.Module, client: Client) -> ClientSetup:
    """Plan a client whose data are not known yet.

    Raises:
        PlanError: no plan fits its devices.
    """
    plan = _plan(job, graph, model, client)
    blueprints = draw_blueprints(graph, plan.cuts, device=torch.device("cpu"))
    return with_plan(job, graph.state, job.strategy.scope(graph.state), client, plan, blueprints)


def with_plan(
    job: Job,
    specs: Mapping[str, StateSpec],
    scope: Scope,
    client: Client,
    plan: Plan,
    pieces: Sequence[Piece],
) -> ClientSetup:
    """A client whose data are not known yet, ready to train by its plan.

    Args:
        job: of the client.
        specs: of the model's tensors.
        scope: what of the model travels.
        client, plan: the client, and how the model is cut over its devices.
        pieces: what each stage holds.

    Raises:
        PlanError: the plan's placement is not its schedule's.
    """
    work = local_work(job, plan, scope)
    return ClientSetup(client, plan, pieces, moved_bytes(job, specs, work, plan, pieces), work, None, None)


@contextlib.contextmanager
def named_in_errors(client: Client) -> Iterator[None]:
    """Say of which client it is that no plan fits."""
    try:
        yield
    except PlanError as error:
        raise type(error)(f"client {client.name}: {error}") from error


def local_work(job: Job, plan: Plan, scope: Scope) -> LocalWork:
    """What a client does in a round, by its plan's schedule.

    Args:
        job, plan: of the client.
        scope: what of the model travels.

    Raises:
        PlanError: the plan's placement is not its schedule's.
    """
    return LocalWork(
        optimizer=job.optimizer,
        schedule=_schedule(job, plan),
        batch_size=job.batch_size,
        num_microbatches=job.num_microbatches,
        local_epochs=job.strategy.local_epochs,
        local_steps=job.strategy.local_steps,
        seed=job.seed,
        evaluate_first=job.federated_evaluation or job.strategy.needs_losses,
        learning_rate=job.learning_rate,
        num_rounds=job.rounds,
        max_gradient_norm=job.max_gradient_norm,
        accumulate_batches=job.accumulate_batches,
        rule=job.strategy.local_rule,
        keeps_optimizer=job.strategy.keeps_optimizer,
        effort=job.strategy.effort,
        scope=scope,
    )


def part_of(dataset: Dataset, blueprints: Sequence[StageBlueprint]) -> Dataset | None:
    """The part of a client's data that a device with these stages needs."""
    has_inputs, has_targets = blueprints[0].is_first, blueprints[-1].is_last
    if has_inputs and has_targets:
        return dataset
    if has_inputs:
        return dataset.without_targets()
    return dataset.without_inputs() if has_targets else None


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


def _plan(job: Job, graph: LayerGraph, model: nn.Module, client: Client) -> Plan:
    with named_in_errors(client):
        return plan_graph(
            graph,
            devices=client.devices,
            links=client.links,
            partitioner=job.partitioner,
            num_microbatches=job.num_microbatches,
            schedule=job.schedule.name,
            batch_size=job.batch_size,
            optimizer_copies=job.optimizer_copies(),
            costs=job.costs,
            model=model,
        )


def _schedule(job: Job, plan: Plan) -> Schedule | PlacedSchedule:
    """The schedule that the plan is for: the job's, or another that fits the memory better."""
    schedule = job.schedule
    if plan.schedule != schedule.name:
        schedule = placed_schedule_by_name(plan.schedule) or schedule_by_name(plan.schedule)
    if isinstance(schedule, PlacedSchedule):
        wanted = tuple(map(tuple, schedule.placement(plan.num_devices)))
    else:
        wanted = tuple((stage,) for stage in range(plan.num_devices))
    if plan.placement != wanted:
        raise PlanError(
            f"partitioner {plan.partitioner!r} placed the stages {plan.placement} on the devices, but schedule "
            f"{schedule.name!r} wants {wanted}"
        )
    return schedule


def moved_bytes(
    job: Job, specs: Mapping[str, StateSpec], work: LocalWork, plan: Plan, pieces: Sequence[Piece]
) -> tuple[DeviceWork, ...]:
    """Bytes of tensors, as they travel, that each device pulls and pushes in a round; a mean where rounds differ."""
    uplink, downlink = job.uplink_channel(specs), job.downlink_channel(specs)
    cycle = max(1, len(work.scope.fragments))
    moved = []
    for device, stages in zip(plan.devices, plan.placement, strict=True):
        down = up = 0
        for piece in (pieces[stage] for stage in stages):
            for round in range(2, 2 + cycle):
                pulled = work.scope.pulled(piece.state, round, whole=False)
                pushed = work.scope.pushed(shared_names(work, piece), round)
                down += sum(downlink.num_bytes(name) for name in pulled)
                up += sum(uplink.num_bytes(name) for name in pushed)
            slots = received_names(work, [piece])
            down += cycle * sum(piece.state[name.partition("/")[2]].num_bytes for name in slots)
        moved.append(DeviceWork(device, down / cycle, up / cycle))
    return tuple(moved)
