"""What the coordinator knows of each device of a plan: what it pulls, what it must push, how long that may be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from fedmp.coordinator import Member
from fedmp.engine.prepare import Prepared
from fedmp.engine.setup import ClientSetup

__all__ = ["members_of", "members_of_client"]


def members_of(prepared: Prepared) -> Iterator[Member]:
    """Every device of every client; those that their plan leaves out have no stages."""
    for setup in prepared.clients.values():
        yield from members_of_client(prepared, setup)


def members_of_client(prepared: Prepared, setup: ClientSetup) -> Iterator[Member]:
    """Every device of one client, also those that are away."""
    plan = setup.plan
    for rank, (device, stages) in enumerate(zip(plan.devices, plan.placement, strict=True)):
        yield _member(prepared, setup, rank, device, stages)
    for left_out in prepared.clients[setup.name].client.devices:
        if left_out.name not in plan.devices:
            yield Member(setup.name, left_out.name, -1, (), (), (), "", 0, plan.digest)


def _member(
    prepared: Prepared, setup: ClientSetup, rank: int, device: str, stages: tuple[int, ...]
) -> Member:
    blueprints = [setup.blueprints[stage] for stage in stages]
    names = tuple(dict.fromkeys(name for blueprint in blueprints for name in blueprint.state))
    pulled = (*names, *setup.received(blueprints))
    pushed = tuple(name for blueprint in blueprints for name in setup.shared(blueprint))
    return Member(
        client=setup.name,
        device=device,
        rank=rank,
        stages=stages,
        pulled=pulled,
        pushed=pushed,
        stage_key=hashlib.sha256("\n".join(pulled).encode()).hexdigest()[:16],
        max_update_bytes=_max_bytes(prepared, pushed) + (4 << 20),
        plan=setup.plan.digest,
        scope=setup.work.scope,
    )


def _max_bytes(prepared: Prepared, pushed: tuple[str, ...]) -> int:
    """What an update of these tensors becomes on its way, and room for names, shapes and the report."""
    channel = prepared.job.uplink_channel(prepared.graph.state)
    parts = [part for name in pushed for part in channel.parts(name).values()]
    return sum(part.num_bytes + 1024 for part in parts)
