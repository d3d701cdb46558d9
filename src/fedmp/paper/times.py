"""How long both sides take for an epoch, by the same planner, the same cost model and the same clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedmp.clock import Clock, SharedLink, time_clients
from fedmp.engine import Job
from fedmp.engine.client_plan import set_up_client
from fedmp.engine.setup import ClientSetup
from fedmp.errors import PlanError
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
        layout: how its devices share the work, in words.
        num_devices: in use.
        train_s: of one epoch.
        ideal_s: of one epoch if its devices worked all the time and messages took none.
        move_s: of bringing the raw data in, once.
        epochs: over which that is spread.
        raw_bytes: that are brought in.
        inside_bytes: between its devices, of all epochs.
    """

    layout: str
    num_devices: int
    train_s: float
    ideal_s: float
    move_s: float
    epochs: float
    raw_bytes: float
    inside_bytes: float

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
    """Predict the centralized side, its devices used in the best way.

    They may form one pipeline, or several that train parts of each batch and add up their gradients (data
    parallelism), down to one device each: whichever is fastest.

    Args:
        work: what is trained.
        settings: the centre.
        sizes: samples of the sites, by their uplinks.

    Raises:
        PlanError: no plan fits the centre.
    """
    num_samples = sum(map(sum, sizes.values()))
    num_steps = math.ceil(num_samples / work.center_batch)
    best = _best_layout(work, settings)
    ends: list[float] = []
    line: SharedLink[tuple[int, int]] = SharedLink(settings.center.uplink.bandwidth_bytes_per_s)
    for group, (uplink, own) in enumerate(sizes.items()):
        for number, size in enumerate(own):
            line.add((group, number), 0.0, size * work.sample_bytes, uplink)
    line.run(lambda _, time_s: ends.append(time_s))
    return CenterTimes(
        layout=best.words,
        num_devices=best.num_devices,
        train_s=num_steps * best.step_s,
        ideal_s=num_steps * best.ideal_s,
        move_s=max(ends) + settings.center.uplink.latency_s,
        epochs=work.epochs,
        raw_bytes=num_samples * work.sample_bytes,
        inside_bytes=work.epochs * num_steps * best.step_bytes,
    )


@dataclass(frozen=True)
class _Layout:
    """A way to use the centre's devices: `ideal_s` is a step's arithmetic at the speed of all of them."""

    words: str
    num_devices: int
    step_s: float
    ideal_s: float
    step_bytes: float


def _best_layout(work: Workload, settings: PaperSettings) -> _Layout:
    devices = settings.center.devices
    layouts, trouble = [], None
    for replicas in range(1, min(len(devices), work.center_batch) + 1):
        if len(devices) % replicas:
            continue
        try:
            layouts.append(_layout(work, settings, replicas))
        except PlanError as error:
            trouble = error
    if not layouts:
        assert trouble is not None
        raise trouble
    return min(layouts, key=lambda layout: layout.step_s)


def _layout(work: Workload, settings: PaperSettings, replicas: int) -> _Layout:
    """So many pipelines over equal parts of the devices, in the order in which they are listed."""
    center, share = settings.center, math.ceil(work.center_batch / replicas)
    size = len(center.devices) // replicas
    # a device alone has nobody to hand micro-batches to
    num_microbatches = min(settings.center_num_microbatches, share) if size > 1 else 1
    job = replace(work.job, batch_size=share, num_microbatches=num_microbatches)
    plans: dict[tuple[float, ...], Plan] = {}
    used: list[Plan] = []
    for first in range(0, len(center.devices), size):
        group = center.devices[first : first + size]
        key = tuple(device.flops_per_s for device in group)
        if key not in plans:
            pipeline = changed(center, devices=group)
            plans[key] = set_up_client(job, work.graph, work.model, pipeline).plan
        used.append(plans[key])
    gradient_bytes = max(stage.parameter_bytes for plan in used for stage in plan.stages)
    # a ring of all replicas of a stage; stages' rings run side by side (Patarasuk and Yuan, 2009)
    link = center.links.default
    ring_s = 2 * (replicas - 1) * link.transfer_s(gradient_bytes / replicas)
    crossed = sum(2 * plan.num_microbatches * stage.boundary_bytes for plan in used for stage in plan.stages)
    added = 2 * (replicas - 1) * sum(stage.parameter_bytes for stage in used[0].stages)
    speed = {device.name: device.flops_per_s for device in center.devices}
    # a plan's stage times, by micro-batch and device, times the device's speed are its arithmetic
    arithmetic = sum(
        used[0].num_microbatches * (stage.forward_s + stage.backward_s) * speed[stage.device]
        for stage in used[0].stages
    )
    stages = used[0].num_devices
    words = (
        f"{replicas} pipelines of {stages} devices" if replicas > 1 else f"one pipeline of {stages} devices"
    )
    if stages == 1:
        words = f"{replicas} devices in data parallel" if replicas > 1 else "one device"
    return _Layout(
        words=words,
        num_devices=sum(plan.num_devices for plan in used),
        step_s=max(plan.step_s for plan in used) + ring_s,
        ideal_s=replicas * arithmetic / sum(speed.values()),
        step_bytes=crossed + added,
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
