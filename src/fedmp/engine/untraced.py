"""A job whose clients have one device each, planned by one look at the model instead of a trace.

With a single stage there is nothing to cut, and tracing costs more than many a simulation (torch's compiler alone
takes 2 s to import). What a step costs is counted while the model's own forward runs once on one batch, with the same
cost functions as a trace's; the graph is made when something else asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from fedmp.cohort import Probe, flat_optimizer
from fedmp.data import Rows, TrainTest
from fedmp.engine.client_plan import named_in_errors, with_plan
from fedmp.engine.job import Job
from fedmp.engine.population import Population, set_up_groups
from fedmp.engine.prepare import Prepared, example_input, scope_of, trace_model, who_has_what
from fedmp.engine.setup import ClientSetup
from fedmp.graph import CutRules, LayerGraph, StateSpec, named_tensors, profile_whole, state_specs
from fedmp.partition.api import plan_profile
from fedmp.topology import Client

__all__ = ["Untraced", "needs_no_trace"]


def needs_no_trace(job: Job) -> bool:
    """Whether all that a trace would tell of a job can be told without."""
    return (
        all(len(group.first.devices) == 1 for group in job.topology.clients.groups)
        and job.costs == "flops"
        and not job.leaves
        and job.cuts == CutRules()
        and not job.clock.losses
    )


@dataclass(frozen=True)
class _Whole:
    """All of a model, as the only stage's piece."""

    state: Mapping[str, StateSpec]

    @property
    def owned(self) -> tuple[str, ...]:
        """All of its tensors."""
        return tuple(self.state)


class Untraced(Prepared):
    """A job that is ready to be simulated, with a plan for each kind of client.

    Args:
        job: the job.
        model: with the initial weights.
        data: training and test samples.
        rows: of each client.
        probe: how the model can be trained for many clients at once.

    Raises:
        PlanError: the model does not fit a client's device.
    """

    def __init__(self, job: Job, model: nn.Module, data: TrainTest, rows: Rows, probe: Probe) -> None:
        example = example_input(data.train, job.batch_size)
        specs = state_specs(model)
        scope = scope_of(job, specs)
        piece = _Whole(specs)
        optimizer = flat_optimizer(job.optimizer)  # to make a torch optimizer imports torch's compiler
        copies = job.optimizer_copies() if optimizer is None else optimizer.num_buffers
        profiled = profile_whole(model, example, optimizer_copies=copies)

        def set_up(client: Client) -> ClientSetup:
            with named_in_errors(client):
                plan = plan_profile(
                    profiled,
                    devices=client.devices,
                    links=client.links,
                    partitioner=job.partitioner,
                    num_microbatches=job.num_microbatches,
                    schedule=job.schedule.name,
                )
            return with_plan(job, specs, scope, client, plan, [piece])

        everyone = job.topology.clients
        clients = Population(everyone, set_up_groups(everyone, set_up), data.train, rows)
        given = {
            "job": job,
            "model": model,
            "data": data,
            "clients": clients,
            "table": who_has_what(clients, data.train, rows),
            "sample_shape": tuple(example.shape[1:]),
            "sample_dtype": example.dtype,
            "notes": (),
            "scope": scope,
            "probe": probe,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @property
    def is_traced(self) -> bool:
        """False."""
        return False

    @cached_property
    def graph(self) -> LayerGraph:
        """The traced model; traced now, if it was not."""
        return trace_model(self.job, self.model, example_input(self.data.train, self.job.batch_size))

    @cached_property
    def specs(self) -> Mapping[str, StateSpec]:
        """Of the model's tensors, by canonical name."""
        return state_specs(self.model)

    def initial_state(self) -> dict[str, torch.Tensor]:
        """The model's own tensors by canonical name."""
        own = named_tensors(self.model)
        return {name: own[name] for name in self.specs}
