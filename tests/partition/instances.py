"""Random planning problems, an event simulator and a planner so plain that they need no tests."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from fedmp.records import LayerProfile, Plan, Profile
from fedmp.schedule import ActionKind, peak_in_flight, schedule_by_name
from fedmp.topology import Device, Link, Links


@dataclass(frozen=True)
class Instance:
    """A planning problem."""

    profile: Profile
    devices: tuple[Device, ...]
    links: Links
    num_microbatches: int


@dataclass(frozen=True)
class Best:
    """The best of all plans; infinite if there is none."""

    step_s: float
    schedule: str = ""
    cuts: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()


def random_instance(
    seed: int,
    *,
    num_layers: tuple[int, int] = (2, 8),
    num_devices: tuple[int, int] = (1, 4),
    num_microbatches: tuple[int, ...] = (1, 2, 3, 5, 8),
    spread: float = 10.0,
    can_bind: bool = True,
    can_rule: bool = False,
) -> Instance:
    """Unequal layers, devices and links; some devices alike, some parameters tied, some cuts forbidden.

    With `can_bind`, half of the problems have devices that hold only part of the model, and a few are
    infeasible; with `can_rule`, a third have forced cuts and layers pinned to devices.
    """
    rng = random.Random(seed)
    layers = rng.randint(*num_layers)
    count = rng.randint(*num_devices)
    sizes = {f"p{index}": rng.randint(1, 40) * 1000 for index in range(layers)}
    tied = [rng.randrange(layers) if rng.random() < 0.15 else index for index in range(layers)]
    profile = Profile(
        layers=tuple(
            LayerProfile(
                name=f"layer{index}",
                forward_s=rng.uniform(0.1, 2.0) * 1e-3,
                backward_s=rng.uniform(0.1, 4.0) * 1e-3,
                parameters=tuple(sorted({f"p{index}", f"p{tied[index]}"})),
                buffer_bytes=rng.randint(0, 3) * 100,
                activation_bytes=float(rng.randint(0, 60) * 100),
                workspace_bytes=float(rng.randint(0, 60) * 100),
                boundary_bytes=float(rng.randint(0, 60) * 100),
                gradient_bytes=float(rng.randint(0, 60) * 100),
                reused_bytes=float(rng.randint(0, 20) * 100),
                can_cut_after=rng.random() < 0.9,
            )
            for index in range(layers)
        ),
        parameter_bytes=sizes,
        reference_flops_per_s=1e11,
        batch_size=rng.choice([4, 8, 10]),
        optimizer_copies=rng.choice([0.0, 1.0, 2.0]),
        update_s_per_byte=rng.choice([0.0, 1e-7]),
    )
    whole = (2 + profile.optimizer_copies) * sum(sizes.values())
    kinds = [
        (
            1e11 * math.exp(rng.uniform(0, math.log(spread))),
            int(whole * rng.uniform(0.25, 1.4)) + rng.randint(1, 99) if can_bind and seed % 2 else 1 << 40,
        )
        for _ in range(rng.randint(1, count))
    ]
    chosen = [rng.choice(kinds) for _ in range(count)]
    devices = tuple(Device(f"d{index}", *kind) for index, kind in enumerate(chosen))
    pairs = {
        f"{a.name},{b.name}": Link(rng.choice([1e7, 1e8, 1e9]), rng.choice([0.0, 1e-4]))
        for a, b in itertools.combinations(devices, 2)
        if rng.random() < 0.5
    }
    links = Links(default=Link(1e8, 1e-4), pairs=pairs if rng.random() < 0.7 else {})
    if can_rule and seed % 3 == 0:
        profile = _with_rules(profile, devices, rng)
    return Instance(profile, devices, links, rng.choice(num_microbatches))


def _with_rules(profile: Profile, devices: tuple[Device, ...], rng: random.Random) -> Profile:
    """Some cuts forced, some layers pinned; sometimes more than any plan can keep."""
    names = [device.name for device in rng.sample(devices, len(devices))]
    layers = []
    for index, layer in enumerate(profile.layers):
        share = index / len(profile.layers) * len(names)
        device = names[min(int(share + rng.uniform(-0.3, 0.3)), len(names) - 1)]
        layers.append(
            layer.model_copy(
                update={
                    "must_cut_after": layer.can_cut_after and rng.random() < 0.15,
                    "device": device if rng.random() < 0.25 else None,
                }
            )
        )
    return profile.model_copy(update={"layers": tuple(layers)})


def brute_force(instance: Instance, schedules: tuple[str, ...]) -> Best:
    """Try every cut, every choice and order of devices, and every schedule."""
    layers = instance.profile.layers
    places = [index + 1 for index in range(len(layers) - 1) if layers[index].can_cut_after]
    best = Best(math.inf)
    for num_stages in range(1, min(len(instance.devices), len(places) + 1) + 1):
        for cuts in itertools.combinations(places, num_stages - 1):
            for order in itertools.permutations(instance.devices, num_stages):
                for schedule in schedules:
                    seconds = plain_step_s(instance, cuts, order, schedule)
                    if seconds < best.step_s:
                        best = Best(seconds, schedule, cuts, tuple(device.name for device in order))
    return best


def plain_step_s(
    instance: Instance, cuts: tuple[int, ...], devices: tuple[Device, ...], schedule: str
) -> float:
    """Predicted seconds of one step, straight from the definitions; infinite if a stage does not fit or a rule
    is broken."""
    profile = instance.profile
    size = math.ceil(profile.batch_size / instance.num_microbatches)
    edges = [0, *cuts, len(profile.layers)]
    for stage, device in enumerate(devices):
        inside = profile.layers[edges[stage] : edges[stage + 1]]
        if any(layer.must_cut_after for layer in inside[:-1]):
            return math.inf
        if any(layer.device not in (None, device.name) for layer in inside):
            return math.inf
    actions = schedule_by_name(schedule).actions(len(devices), instance.num_microbatches)
    forward, backward, send, gradient = [], [], [], []
    for stage, device in enumerate(devices):
        start, stop = edges[stage], edges[stage + 1]
        inside = profile.layers[start:stop]
        slowness = profile.reference_flops_per_s / device.flops_per_s
        forward.append(size * sum(layer.forward_s for layer in inside) * slowness)
        updated = sum(profile.parameter_bytes[name] for layer in inside for name in layer.parameters)
        update_s = profile.update_s_per_byte * updated / instance.num_microbatches
        backward.append((size * sum(layer.backward_s for layer in inside) + update_s) * slowness)
        names = {name for layer in inside for name in layer.parameters}
        weights = sum(profile.parameter_bytes[name] for name in names)
        memory = profile.process_bytes + weights * (2 + profile.optimizer_copies)
        memory += sum(layer.buffer_bytes for layer in inside)
        memory += size * plain_activations(profile, start, stop, peak_in_flight(actions[stage]))
        memory += size * plain_frames(profile, start, stop, peak_in_flight(actions[stage]), instance)
        if memory > device.memory_bytes:
            return math.inf
        if stop < len(profile.layers):
            link = instance.links.between(device.name, devices[stage + 1].name)
            send.append(link.transfer_s(size * profile.layers[stop - 1].boundary_bytes))
            gradient.append(link.transfer_s(size * profile.layers[stop - 1].gradient_bytes))
    return plain_simulation(forward, backward, send, gradient, actions)


def plain_activations(profile: Profile, start: int, stop: int, in_flight: int) -> float:
    """What a sample of each micro-batch in flight keeps, while the backward of one of them is on its way back."""
    kept = [layer.activation_bytes for layer in profile.layers[start:stop]]
    received = profile.layers[start - 1].reused_bytes if start else 0.0
    workspaces = [layer.workspace_bytes for layer in profile.layers[start:stop]]
    on_the_way = max(sum(kept[: at + 1]) + space for at, space in enumerate(workspaces))
    return in_flight * max(sum(kept) - received, 0.0) + max(on_the_way - sum(kept), 0.0)


def plain_frames(profile: Profile, start: int, stop: int, in_flight: int, instance: Instance) -> float:
    """What a sample of each micro-batch takes in messages that come, wait, or go."""
    count, layers, total = instance.num_microbatches, profile.layers, 0.0
    if start > 0:
        total += min(in_flight + 1, count) * layers[start - 1].boundary_bytes
        total += min(in_flight + 3, count) * layers[start - 1].gradient_bytes
    if stop < len(layers):
        total += min(in_flight + 1, count) * layers[stop - 1].boundary_bytes
        total += min(2, count) * layers[stop - 1].gradient_bytes
    return total


def plain_simulation(forward, backward, send, gradient, actions) -> float:  # type: ignore[no-untyped-def]
    """Let time pass: at every event, start whatever may start."""
    num_stages = len(forward)
    at = [0] * num_stages
    busy_until = [0.0] * num_stages
    arrived: dict[tuple[int, bool, int], float] = {}
    links: dict[tuple[int, int], float] = {}
    while any(at[stage] < len(actions[stage]) for stage in range(num_stages)):
        startable = []
        for stage in range(num_stages):
            if at[stage] == len(actions[stage]):
                continue
            kind, index = actions[stage][at[stage]]
            source = stage == 0 if kind is ActionKind.FORWARD else stage == num_stages - 1
            source |= kind is ActionKind.BACKWARD_WEIGHT
            came = (stage, kind is ActionKind.FORWARD, index)
            ready = 0.0 if source else arrived.get(came)
            if ready is not None:
                startable.append((max(ready, busy_until[stage]), stage))
        start, stage = min(startable)
        kind, index = actions[stage][at[stage]]
        at[stage] += 1
        whole = forward[stage] if kind is ActionKind.FORWARD else backward[stage]
        stop = start + (whole if kind in (ActionKind.FORWARD, ActionKind.BACKWARD) else whole / 2)
        busy_until[stage] = stop
        if kind is ActionKind.BACKWARD_WEIGHT:
            continue
        to = stage + 1 if kind is ActionKind.FORWARD else stage - 1
        if 0 <= to < num_stages:
            took = send[stage] if kind is ActionKind.FORWARD else gradient[to]
            leaves = max(stop, links.get((stage, to), 0.0))
            links[stage, to] = leaves + took
            arrived[to, kind is ActionKind.FORWARD, index] = leaves + took
    return max(busy_until)


def order_of(plan: Plan) -> tuple[str, ...]:
    """The plan's devices, in order."""
    return tuple(stage.device for stage in plan.stages)
