"""The seam that a user's own partitioner fits: one method, nothing to inherit, nothing to register."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from fedmp.records import Plan, Profile
from fedmp.topology import Device, Links

__all__ = ["Partitioner"]


@runtime_checkable
class Partitioner(Protocol):
    """Anything that cuts a model over a client's devices. `docs/partitioners.md` builds one step by step."""

    def plan(
        self, profile: Profile, devices: Sequence[Device], links: Links, *, num_microbatches: int
    ) -> Plan:
        """Choose the cuts and which device takes which stage.

        The same arguments must give the same plan. `build_plan` turns the choice into a `Plan`.

        Args:
            profile: what each layer costs, per sample on a reference device.
            devices: the client's devices, with different names; a plan need not use them all.
            links: the links between any two of them.
            num_microbatches: how many micro-batches one batch is cut into.

        Raises:
            PlanError: the model cannot be cut as the partitioner wants.
            InfeasibleError: no plan fits the devices' memory; says what would make one fit.
        """
        ...
