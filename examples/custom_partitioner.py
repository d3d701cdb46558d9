"""A partitioner of your own, in ten lines, on a site whose devices are as unequal as they come.

python examples/custom_partitioner.py
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import nn

import fedmp
from fedmp.partition import build_plan, check_partitioner
from fedmp.records import Profile


class FastestFirst:
    """The fastest device first, and to each device layers as its share of the speed."""

    def plan(
        self,
        profile: Profile,
        devices: Sequence[fedmp.Device],
        links: fedmp.Links,
        *,
        num_microbatches: int,
    ) -> fedmp.Plan:
        places = [index for index, layer in enumerate(profile.layers[:-1], start=1) if layer.can_cut_after]
        order = sorted(devices, key=lambda device: -device.flops_per_s)[: len(places) + 1]
        work = [0.0, *accumulate(layer.forward_s + layer.backward_s for layer in profile.layers)]
        speed = list(accumulate(device.flops_per_s for device in order))
        ideal = [work[-1] * done / speed[-1] for done in speed[:-1]]
        cuts = sorted({min(places, key=lambda place: abs(work[place] - wanted)) for wanted in ideal})
        used = order[: len(cuts) + 1]
        unused = [device.name for device in devices if device not in used]
        return build_plan(
            profile,
            used,
            cuts,
            links,
            num_microbatches=num_microbatches,
            partitioner="mine",
            unused_devices=unused,
        )


def main() -> None:
    """Plan one model in three ways and print what each predicts."""
    check_partitioner(FastestFirst())  # keeps every promise that fedmp relies on
    widths = [64, 512, 512, 512, 512, 256, 256, 128, 64, 10]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)))
    devices = [
        fedmp.Device("tablet", flops_per_s=2e9, memory_bytes="2 GiB"),
        fedmp.Device("laptop", flops_per_s=2e10, memory_bytes="4 GiB"),
        fedmp.Device("workstation", flops_per_s=2e11, memory_bytes="16 GiB"),
        fedmp.Device("old-gpu", flops_per_s=1e11, memory_bytes="4 GiB"),
    ]
    for partitioner in ("uniform", FastestFirst(), "exact"):
        plan = fedmp.partition(model, (torch.zeros(4096, 64),), devices=devices, partitioner=partitioner)
        stages = ", ".join(f"{stage.device} {stage.stop - stage.start}" for stage in plan.stages)
        print(f"{plan.partitioner:8} {plan.step_s * 1e3:7.1f} ms a step; layers: {stages}")


if __name__ == "__main__":
    main()
