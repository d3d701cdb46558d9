"""The contract suite: every partitioner passes it, and broken ones do not. One line for each new one."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from fedmp.partition import Balanced, Exact, Partitioner, Uniform, build_plan, check_partitioner
from fedmp.records import Plan, Profile
from fedmp.topology import Device, Links


class Halves:
    """The smallest partitioner of a user's own: two devices, one cut."""

    def __repr__(self) -> str:
        return "Halves()"

    def plan(
        self, profile: Profile, devices: Sequence[Device], links: Links, *, num_microbatches: int
    ) -> Plan:
        used = devices[:2] if len(profile.layers) > 1 else devices[:1]
        cut = next(
            (i for i in range(len(profile.layers) // 2, 0, -1) if profile.layers[i - 1].can_cut_after), 0
        )
        return build_plan(
            profile,
            used,
            [cut][: len(used) - 1],
            links,
            num_microbatches=num_microbatches,
            unused_devices=[device.name for device in devices[len(used) :]],
        )


@pytest.mark.parametrize(
    "partitioner",
    [
        Uniform(),
        Uniform(schedule="gpipe"),
        Balanced(),
        Balanced(schedule="gpipe"),
        Balanced(schedule="1f1b-short"),
        Exact(),
        Exact(schedule="gpipe"),
        Exact(schedule="1f1b-short"),
        Exact(max_expansions=1),
        Uniform(schedule="zero-bubble"),
        Balanced(schedule="zero-bubble"),
        Exact(schedule="zero-bubble"),
        Exact(max_cells=1),
        Uniform(schedule="interleaved"),
        Balanced(schedule="interleaved-3"),
        Balanced(schedule="v-shape"),
        Exact(schedule="interleaved"),
        Exact(schedule="v-shape-whole"),
        Halves(),
    ],
    ids=repr,
)
def test_every_partitioner_keeps_the_contract(partitioner: Partitioner) -> None:
    check_partitioner(partitioner)
    assert isinstance(partitioner, Partitioner)


class Twisted:
    """Changes what a good partitioner returns."""

    def __init__(self, change: str) -> None:
        self.change = change

    def plan(
        self, profile: Profile, devices: Sequence[Device], links: Links, *, num_microbatches: int
    ) -> Plan:
        roomy = [Device(device.name, device.flops_per_s, 1 << 40) for device in devices]
        real = {device.name: int(device.memory_bytes) for device in devices}
        plan = Uniform().plan(profile, roomy, links, num_microbatches=num_microbatches)
        stages = [
            stage.model_copy(update={"device_memory_bytes": real[stage.device]}) for stage in plan.stages
        ]
        plan = plan.model_copy(update={"stages": tuple(stages)})
        if self.change == "boast":
            return plan.model_copy(update={"step_s": plan.step_s / 2})
        if self.change == "forget":
            return plan.model_copy(update={"stages": plan.stages[:-1]})
        if self.change == "dice":
            return plan.model_copy(update={"partitioner": str(random.random())})
        if self.change == "invent":
            stages = [stage.model_copy(update={"device": f"x{stage.device}"}) for stage in plan.stages]
            return plan.model_copy(update={"stages": tuple(stages)})
        return plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("boast", "build_plan predicts"),
        ("forget", "each layer must be in one stage"),
        ("dice", "another plan the second time"),
        ("invent", "unknown devices"),
        ("overfill", "does not fit"),
    ],
)
def test_a_partitioner_that_breaks_a_rule_is_told_which(change: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_partitioner(Twisted(change))
