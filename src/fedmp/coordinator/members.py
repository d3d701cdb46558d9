"""What the coordinator knows of devices, and what it tells of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmp.strategy import Scope

__all__ = ["BoardStatus", "Member"]


@dataclass(frozen=True)
class Member:
    """A device that the coordinator knows.

    Attributes:
        client, device: names in the topology.
        rank: its number among the client's devices.
        stages: of the client's plan, that it runs; none if the plan leaves it out.
        pulled: all tensors that it may pull, with the server's slots.
        pushed: all tensors that it may have to push.
        stage_key: equal for devices that pull the same tensors.
        max_update_bytes: longest body that it may push.
        plan: digest of the client's plan; empty where devices need not know it.
        scope: which of these travel in which round.
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
    scope: Scope = field(default_factory=Scope)

    def pulled_in(self, round: int, *, whole: bool) -> tuple[str, ...]:
        """The tensors that it pulls in a round; all of them if it has no values of its own."""
        return self.scope.pulled(self.pulled, round, whole=whole)

    def pushed_in(self, round: int) -> tuple[str, ...]:
        """The tensors that it must push in a round."""
        return self.scope.pushed(self.pushed, round)


@dataclass(frozen=True)
class BoardStatus:
    """How things stand.

    Attributes:
        kind: what the devices are told to do: "train", "wait" or "stop".
        round: the newest round that was opened; 0 before the first.
        cohort: its clients.
        num_reported: those of which every device has reported.
        num_late: those that go on with an earlier round.
        silent_s: seconds since each device was last heard, by client and device; none that never was.
        bytes_up, bytes_down: bodies of accepted updates, and of stages handed out.
    """

    kind: str
    round: int
    cohort: tuple[str, ...]
    num_reported: int
    num_late: int
    silent_s: Mapping[tuple[str, str], float]
    bytes_up: int
    bytes_down: int
