"""Clients whose times can be computed in the head."""

from __future__ import annotations

from fedmp.clock import ClientTiming, ClientWork, Clock, DeviceWork, time_clients
from fedmp.records import Plan, StagePlan
from fedmp.topology import Link

LINE = Link(bandwidth_bytes_per_s=100.0, latency_s=1.0)


def plan(
    *stages: tuple[float, float], step_s: float = 10.0, send_s: float = 0.0, schedule: str = "gpipe"
) -> Plan:
    """A plan of stages with these forward and backward seconds, two micro-batches a step."""
    return Plan(
        layer_names=tuple(f"layer{index}" for index in range(len(stages))),
        stages=tuple(
            StagePlan(
                device=f"d{index}",
                start=index,
                stop=index + 1,
                forward_s=forward_s,
                backward_s=backward_s,
                send_s=send_s if index + 1 < len(stages) else 0.0,
                gradient_s=send_s if index + 1 < len(stages) else 0.0,
            )
            for index, (forward_s, backward_s) in enumerate(stages)
        ),
        partitioner="custom",
        schedule=schedule,
        num_microbatches=2,
        microbatch_size=1,
        step_s=step_s,
    )


def work(
    client: str = "c0",
    *,
    down: tuple[float, ...] = (100.0,),
    up: tuple[float, ...] = (100.0,),
    uplink: Link = LINE,
    num_batches: int = 1,
    step_s: float = 10.0,
) -> ClientWork:
    """A client whose devices move so many bytes and whose steps take ten seconds."""
    sizes = zip(down, up, strict=True)
    devices = tuple(DeviceWork(f"d{rank}", first, second) for rank, (first, second) in enumerate(sizes))
    stages = [(1.0, 2.0)] * len(down)
    return ClientWork(client, uplink, plan(*stages, step_s=step_s), num_batches, devices)


def arrivals(
    *works: ClientWork, clock: Clock | None = None, start_s: float = 0.0, round: int = 1
) -> list[float]:
    """When the clients' updates arrive."""
    return [timing.arrival_s for timing in times(*works, clock=clock, start_s=start_s, round=round)]


def times(
    *works: ClientWork, clock: Clock | None = None, start_s: float = 0.0, round: int = 1
) -> list[ClientTiming]:
    """The clients' rounds."""
    return time_clients(works, clock or Clock(), round=round, seed=0, start_s=start_s)
