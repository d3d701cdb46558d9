"""How the improvement grows or vanishes with each assumption; times alone, so no training is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Group
from rich.table import Table

from fedmp.engine.client_plan import set_up_client
from fedmp.engine.setup import ClientSetup
from fedmp.errors import PlanError
from fedmp.paper.settings import PaperSettings
from fedmp.paper.times import Workload, changed, time_center, time_sites
from fedmp.report import format_seconds
from fedmp.topology import Client, Device, Link

__all__ = ["CurvePoint", "compute_curves", "curves_tables"]


@dataclass(frozen=True)
class CurvePoint:
    """Both sides with one assumption changed.

    Attributes:
        curve: which assumption.
        value: its value.
        is_default: whether that is what the table assumes.
        center_s, fedmp_s: an epoch of each side; the centre's has its share of bringing the data in.
    """

    curve: str
    value: float
    is_default: bool
    center_s: float
    fedmp_s: float

    @property
    def improvement(self) -> float:
        """Share of the centralized time that is saved; negative where centralized training is faster."""
        return 1.0 - self.fedmp_s / self.center_s


def compute_curves(work: Workload, settings: PaperSettings, sizes: Sequence[int]) -> list[CurvePoint]:
    """Vary one assumption at a time.

    Args:
        work: what is trained.
        settings: the centre and the variations.
        sizes: samples of each site of the job.

    Raises:
        PlanError: no plan fits the job's own hardware; variations that do not fit are left out.
    """
    return [point for curve in _CURVES for point in _points(curve, work, settings, list(sizes))]


def curves_tables(points: Sequence[CurvePoint]) -> Group:
    """One table a curve.

    Args:
        points: of all curves.
    """
    tables = []
    for curve in dict.fromkeys(point.curve for point in points):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, border_style="bright_black")
        for name in (CURVE_TITLES[curve], "centralized", "fedmp", "improvement"):
            table.add_column(name, justify="right", no_wrap=True)
        for point in points:
            if point.curve == curve:
                table.add_row(
                    f"{point.value:g}{' *' if point.is_default else '  '}",
                    format_seconds(point.center_s),
                    format_seconds(point.fedmp_s),
                    _percent(point),
                    style="bold" if point.is_default else "",
                )
        tables.append(table)
    return Group("time per epoch (* as in the table)", *tables)


CURVE_TITLES = {
    "uplink": "uplink, Mbit/s",
    "sites": "sites",
    "device_speed": "speed of all, times",
    "center_speed": "speed of the centre, times",
    "data_size": "samples, times",
}


def _percent(point: CurvePoint) -> str:
    if point.improvement < 0:
        return f"x {point.fedmp_s / point.center_s:.3g}, centralized wins"
    return f"-{100 * point.improvement:.0f} %"


@dataclass(frozen=True)
class _World:
    """Both sides' hardware and data."""

    clients: Sequence[Client]
    sizes: tuple[int, ...]
    center: Client


def _points(
    curve: str, work: Workload, settings: PaperSettings, sizes: Sequence[int]
) -> Iterator[CurvePoint]:
    base = _World(work.job.topology.clients, tuple(sizes), settings.center)
    values, default, change = _CURVES[curve](settings, base)
    for value in sorted({*values, default}):
        try:
            center_s, fedmp_s = _times(work, settings, base if value == default else change(value))
        except PlanError:
            if value == default:
                raise
            continue  # too slow or too small for any plan
        yield CurvePoint(curve, value, value == default, center_s, fedmp_s)


def _times(work: Workload, settings: PaperSettings, world: _World) -> tuple[float, float]:
    alike: dict[str, ClientSetup] = {}
    setups = []
    for client in world.clients:
        key = f"{client.devices}{client.links}"
        if key not in alike:
            alike[key] = set_up_client(work.job, work.graph, work.model, client)
        setups.append(replace(alike[key], client=client))
    sites = time_sites(setups, world.sizes, work.job.clock, seed=work.job.seed)
    by_uplink: dict[Link, list[int]] = {}
    for client, size in zip(world.clients, world.sizes, strict=True):
        by_uplink.setdefault(client.uplink, []).append(size)
    center = time_center(work, settings.model_copy(update={"center": world.center}), by_uplink)
    return center.epoch_s, sites.epoch_s


_Curve = tuple[Sequence[float], float, Callable[[float], _World]]


def _uplinks(settings: PaperSettings, base: _World) -> _Curve:
    default = base.clients[0].uplink.bandwidth_bytes_per_s * 8 / 1e6

    def change(value: float) -> _World:
        clients = tuple(
            changed(client, uplink=Link(value * 1e6 / 8, client.uplink.latency_s)) for client in base.clients
        )
        return replace(base, clients=clients)

    return settings.vary.uplink_mbit_per_s, default, change


def _sites(settings: PaperSettings, base: _World) -> _Curve:
    total = sum(base.sizes)

    def change(value: float) -> _World:
        count = round(value)
        clients = tuple(changed(base.clients[0], name=f"c{number}") for number in range(count))
        sizes = tuple(total * (number + 1) // count - total * number // count for number in range(count))
        return replace(base, clients=clients, sizes=sizes)

    return settings.vary.sites, len(base.clients), change


def _device_speeds(settings: PaperSettings, base: _World) -> _Curve:
    def change(value: float) -> _World:
        clients = tuple(changed(client, devices=_faster(client.devices, value)) for client in base.clients)
        center = changed(base.center, devices=_faster(base.center.devices, value))
        return replace(base, clients=clients, center=center)

    return settings.vary.device_speed, 1.0, change


def _center_speeds(settings: PaperSettings, base: _World) -> _Curve:
    def change(value: float) -> _World:
        return replace(base, center=changed(base.center, devices=_faster(base.center.devices, value)))

    return settings.vary.center_speed, 1.0, change


def _data_sizes(settings: PaperSettings, base: _World) -> _Curve:
    def change(value: float) -> _World:
        return replace(base, sizes=tuple(max(1, round(value * size)) for size in base.sizes))

    return settings.vary.data_size, 1.0, change


def _faster(devices: Sequence[Device], factor: float) -> tuple[Device, ...]:
    return tuple(
        Device(device.name, flops_per_s=device.flops_per_s * factor, memory_bytes=device.memory_bytes)
        for device in devices
    )


_CURVES: dict[str, Callable[[PaperSettings, _World], _Curve]] = {
    "uplink": _uplinks,
    "sites": _sites,
    "device_speed": _device_speeds,
    "center_speed": _center_speeds,
    "data_size": _data_sizes,
}
