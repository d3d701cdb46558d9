"""How long both sides take for an epoch, by the same planner, the same cost model and the same clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedmp.clock import Clock, SharedLink, time_clients
from fedmp.engine import Job
from fedmp.engine.prepare import ClientSetup, set_up_client
from fedmp.graph import LayerGraph
from fedmp.paper.settings import PaperSettings
from fedmp.records import Plan
from fedmp.topology import Client, Link

__all__ = ["CenterTimes", "SiteTimes", "Workload", "time_center", "time_sites"]


@dataclass(frozen=True, eq=False)
class Workload:
    """What both sides train.

    Attributes:
        job: the federation's.
        graph, model: the traced model.
        sample_bytes: of one raw sample with its label, as it is stored.
        epochs: passes over the data that each side makes.
        center_batch: samples in a step of the centralized training.
    """

    job: Job
    graph: LayerGraph
    model: nn.Module
    sample_bytes: float
    epochs: float
    center_batch: int


@dataclass(frozen=True)
class CenterTimes:
    """The centralized side.

    Attributes:
        plan: of its pipeline.
        train_s: of one epoch.
        ideal_s: of one epoch if its devices worked all the time and messages took none.
        move_s: of bringing the raw data in, once.
        epochs: over which that is spread.
        raw_bytes: that are brought in.
        pipeline_bytes: between its devices, of all epochs.
    """

    plan: Plan
    train_s: float
    ideal_s: float
    move_s: float
    epochs: float
    raw_bytes: float
    pipeline_bytes: float

    @property
    def epoch_s(self) -> float:
        """Seconds of an epoch, with its share of bringing the data in."""
        return self.train_s + self.move_s / self.epochs


@dataclass(frozen=True)
class SiteTimes:
    """The federation.

    Attributes:
        epoch_s: of one pass over all data: rounds, with pulls, pushes and waiting.
        train_s: of that, the training of the slowest site.
    """

    epoch_s: float
    train_s: float


def time_center(work: Workload, settings: PaperSettings, sizes: Mapping[Link, Sequence[int]]) -> CenterTimes:
    """Predict the centralized side.

    Args:
        work: what is trained.
        settings: the centre.
        sizes: samples of the sites, by their uplinks.

    Raises:
        PlanError: no plan fits the centre.
    """
    job = replace(work.job, batch_size=work.center_batch, num_microbatches=settings.center_num_microbatches)
    setup = set_up_client(job, work.graph, work.model, settings.center)
    num_samples = sum(map(sum, sizes.values()))
    steps = math.ceil(num_samples / work.center_batch)
    plan = setup.plan
    # a plan's stage times are by micro-batch and device; the speed of a device turns them into work
    speed = {device.name: device.flops_per_s for device in settings.center.devices}
    work_per_step = plan.num_microbatches * sum(
        (stage.forward_s + stage.backward_s) * speed[stage.device] for stage in plan.stages
    )
    ends: list[float] = []
    line: SharedLink[tuple[int, int]] = SharedLink(settings.center.uplink.bandwidth_bytes_per_s)
    for group, (uplink, own) in enumerate(sizes.items()):
        for number, size in enumerate(own):
            line.add((group, number), 0.0, size * work.sample_bytes, uplink)
    line.run(lambda _, time_s: ends.append(time_s))
    boundary_bytes = 2 * plan.num_microbatches * sum(stage.boundary_bytes for stage in plan.stages)
    return CenterTimes(
        plan=plan,
        train_s=steps * plan.step_s,
        ideal_s=steps * work_per_step / sum(speed.values()),
        move_s=max(ends) + settings.center.uplink.latency_s,
        epochs=work.epochs,
        raw_bytes=num_samples * work.sample_bytes,
        pipeline_bytes=work.epochs * steps * boundary_bytes,
    )


def time_sites(setups: Sequence[ClientSetup], sizes: Sequence[int], clock: Clock, *, seed: int) -> SiteTimes:
    """Predict the federation, with every site in every round.

    Args:
        setups: the sites.
        sizes: samples of each.
        clock: the conditions.
        seed: of what chance decides.
    """
    works = [setup.round_work(size) for setup, size in zip(setups, sizes, strict=True)]
    timings = time_clients(works, clock, round=1, seed=seed)
    processed = sum(setup.work.num_examples(size) for setup, size in zip(setups, sizes, strict=True))
    rounds = sum(sizes) / processed
    return SiteTimes(
        epoch_s=rounds * max(timing.arrival_s for timing in timings),
        train_s=rounds * max(work.num_batches * work.plan.step_s for work in works),
    )


def changed(client: Client, **fields: Any) -> Client:
    """A client with other devices or links."""
    return client.model_copy(update=fields)
