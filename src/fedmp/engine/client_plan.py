"""One client of a job: how the model is cut over its devices, what it does in a round, and what that moves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedmp.client import LocalWork
from fedmp.clock import DeviceWork
from fedmp.data import Dataset
from fedmp.engine.job import Job
from fedmp.engine.setup import ClientSetup, Piece, received_names, shared_names
from fedmp.errors import PlanError
from fedmp.graph import LayerGraph, StateSpec
from fedmp.partition.api import plan_graph
from fedmp.records import Plan
from fedmp.schedule import PlacedSchedule, Schedule, placed_schedule_by_name, schedule_by_name
from fedmp.stages import StageBlueprint, draw_blueprints
from fedmp.strategy import Scope
from fedmp.topology import Client, Device

if TYPE_CHECKING:
    from fedmp.engine.prepare import Prepared

__all__ = [
    "cut_by",
    "local_work",
    "moved_bytes",
    "named_in_errors",
    "part_of",
    "plan_anew",
    "set_up_client",
    "with_plan",
]


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


def part_of(dataset: Dataset, blueprints: Sequence[StageBlueprint]) -> Dataset | None:
    """The part of a client's data that a device with these stages needs."""
    has_inputs, has_targets = blueprints[0].is_first, blueprints[-1].is_last
    if has_inputs and has_targets:
        return dataset
    if has_inputs:
        return dataset.without_targets()
    return dataset.without_inputs() if has_targets else None


@contextlib.contextmanager
def named_in_errors(client: Client) -> Iterator[None]:
    """Say of which client it is that no plan fits.

    Raises:
        PlanError: what was raised inside, with the client's name.
    """
    try:
        yield
    except PlanError as error:
        raise type(error)(f"client {client.name}: {error}") from error


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
