"""What a profile asks of every plan beside memory: forced cuts, and layers pinned to a device.

`check_rules` finds what no plan over these devices could keep, before anything is searched; `check_stages`
judges one choice of cuts and devices. What is searched in between asks `CostModel.allows`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fedmp.errors import PlanError
from fedmp.records import Profile
from fedmp.schedule import placed_schedule_by_name
from fedmp.topology import Device

__all__ = ["check_rules", "check_stages"]


def check_rules(profile: Profile, devices: Sequence[Device], schedule: str) -> None:
    """Refuse rules that no plan can keep, in any order of the devices.

    Args:
        profile: with the rules.
        devices: the client's.
        schedule: one that gives a device several stages can keep more.

    Raises:
        PlanError: a device is unknown, would need two stages, cannot be parted from the next, or there
            are too few devices.
    """
    layers, names = profile.layers, [device.name for device in devices]
    pins = [(index, layer.device) for index, layer in enumerate(layers) if layer.device is not None]
    for index, device in pins:
        if device not in names:
            raise PlanError(
                f"layer {layers[index].name!r} is to run on device {device!r}, but there are only {', '.join(names)}"
            )
    for (index, device), (later, follower) in itertools.pairwise(pins):
        if device != follower and not any(layer.can_cut_after for layer in layers[index:later]):
            raise PlanError(
                f"layer {layers[index].name!r} is to run on device {device!r} and {layers[later].name!r} on "
                f"{follower!r}, but the model cannot be cut between them"
            )
    if placed_schedule_by_name(schedule) is None:
        _check_one_stage(profile, pins)
        least = _least_stages(profile)
        if least > len(devices):
            raise PlanError(
                f"forced cuts and pinned layers make at least {least} stages, but there are {len(devices)} "
                f"devices; give more devices or force fewer cuts"
            )


def check_stages(profile: Profile, edges: Sequence[int], devices: Sequence[str]) -> None:
    """Refuse stages that do not keep the rules.

    Args:
        profile: with the rules.
        edges: where the stages start, and the number of layers.
        devices: the device of each stage, by name.

    Raises:
        PlanError: a forced cut is missing, or a layer is on another device than it is pinned to.
    """
    for (start, stop), device in zip(itertools.pairwise(edges), devices, strict=True):
        for index in range(start, stop):
            layer = profile.layers[index]
            if layer.must_cut_after and index + 1 < stop:
                raise PlanError(
                    f"the model must be cut after layer {layer.name!r}, but layers {start} to {stop - 1} are one stage"
                )
            if layer.device not in (None, device):
                raise PlanError(
                    f"layer {layer.name!r} is to run on device {layer.device!r}, not on {device!r}"
                )


def _check_one_stage(profile: Profile, pins: Sequence[tuple[int, str]]) -> None:
    """Refuse pins that would give a device two stages."""
    layers, first = profile.layers, dict[str, int]()
    for (index, device), (later, follower) in itertools.pairwise(pins):
        first.setdefault(device, index)
        is_parted = any(layer.must_cut_after for layer in layers[index:later])
        if follower in first and (device != follower or is_parted):
            raise PlanError(
                f"device {follower!r} is to run layers {layers[first[follower]].name!r} and {layers[later].name!r}, "
                f"but {'a cut' if device == follower else repr(layers[index].name)} comes between them, and a "
                f"device holds one stage; pin fewer layers"
            )


def _least_stages(profile: Profile) -> int:
    """Each run of layers between forced cuts is a stage, or one for each device that it is pinned to."""
    stages, pinned = 0, set[str]()
    for layer in profile.layers:
        if layer.device is not None:
            pinned.add(layer.device)
        if layer.must_cut_after and layer is not profile.layers[-1]:
            stages, pinned = stages + max(1, len(pinned)), set()
    return stages + max(1, len(pinned))
