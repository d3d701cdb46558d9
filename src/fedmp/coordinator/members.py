"""What the coordinator knows of devices, and what it tells of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BoardStatus", "Member"]


@dataclass(frozen=True)
class Member:
    """A device that the coordinator knows.

    Attributes:
        client, device: names in the topology.
        rank: its number among the client's devices.
        stages: of the client's plan, that it runs; none if the plan leaves it out.
        pulled: tensors that it pulls each round.
        pushed: tensors that it must push.
        stage_key: equal for devices that pull the same tensors.
        max_update_bytes: longest body that it may push.
        plan: digest of the client's plan; empty where devices need not know it.
    """

    client: str
    device: str
    rank: int
    stages: tuple[int, ...]
    pulled: tuple[str, ...]
    pushed: tuple[str, ...]
    stage_key: str
    max_update_bytes: int
    plan: str = ""


@dataclass(frozen=True)
class BoardStatus:
    """How things stand.

    Attributes:
        kind: what the devices are told to do: "train", "wait" or "stop".
        round: the newest round that was opened; 0 before the first.
        cohort: its clients.
        num_reported: those of which every device has reported.
        silent_s: seconds since each device was last heard, by client and device; none that never was.
        bytes_up, bytes_down: bodies of accepted updates, and of stages handed out.
    """

    kind: str
    round: int
    cohort: tuple[str, ...]
    num_reported: int
    silent_s: Mapping[tuple[str, str], float]
    bytes_up: int
    bytes_down: int
