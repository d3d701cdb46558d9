"""Who takes part: clients, their devices, and the links between them.

A topology comes from a YAML file of the `topology` config group or from Python, and goes to the
planner (devices and links of one client) and to the engines (all of it). Speeds are sustained FP32
throughput in training, not the data sheet's peak. A device or link may name a preset of published hardware.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ByteSize, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from fedmp.component import Component
from fedmp.presets import device_fields, link_fields

__all__ = ["Client", "Device", "Link", "Links", "Topology"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Device:
    """One machine or accelerator of a client; it runs one process and holds one stage.

    Args:
        name: unique within its client.
        flops_per_s: sustained FP32 training throughput, in floating-point operations a second.
        memory_bytes: memory for weights, gradients, optimizer state and activations; an integer or a
            string with a unit, such as "4 GiB".
    """

    name: str = Field(min_length=1)
    flops_per_s: float = Field(default=2e11, gt=0)
    memory_bytes: ByteSize = Field(default=ByteSize(4 << 30), gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        return _fill_in(values, device_fields)

    @classmethod
    def like(cls, preset: str, *, name: str) -> Device:
        """A device as a preset describes it.

        Args:
            preset: one of `fedmp.presets.DEVICES`.
            name: of the device.

        Raises:
            ValueError: there is no such preset.

        Example:
            >>> Device.like("jetson-nano", name="nano").memory_bytes
            4294967296
        """
        return cls(name=name, **device_fields(preset))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Link:
    """A network link, the same in both directions.

    Args:
        bandwidth_bytes_per_s: bytes (not bits) a second; 125e6 is 1 Gbit/s.
        latency_s: seconds one way, added to every message.
    """

    bandwidth_bytes_per_s: float = Field(default=125e6, gt=0)
    latency_s: float = Field(default=2e-4, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        return _fill_in({"preset": values} if isinstance(values, str) else values, link_fields)

    @classmethod
    def like(cls, preset: str) -> Link:
        """A link as a preset describes it.

        Args:
            preset: one of `fedmp.presets.LINKS`.

        Raises:
            ValueError: there is no such preset.

        Example:
            >>> Link.like("wan-100").latency_s
            0.02
        """
        return cls(**link_fields(preset))

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds that a message of `num_bytes` takes; zero bytes take no time at all."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s if num_bytes > 0 else 0.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Links:
    """The links inside one client: one for every pair of devices, unless a pair has its own.

    Args:
        default: the link between any two devices that no entry of `pairs` names.
        pairs: links of particular pairs, by "a,b" (either order).

    Example:
        >>> links = Links(pairs={"a,b": Link(12.5e6, 1e-3)})
        >>> links.between("b", "a").latency_s
        0.001
    """

    default: Link = Field(default_factory=Link)
    pairs: Mapping[str, Link] = Field(default_factory=dict)

    def between(self, first: str, second: str) -> Link:
        """The link between two devices, by name, in either order."""
        return self.pairs.get(f"{first},{second}") or self.pairs.get(f"{second},{first}") or self.default


class Client(Component):
    """A data owner: one trust domain with its own devices and its own local data.

    Args:
        name: unique in the topology.
        devices: the devices, or a shorthand `{count: 4, flops_per_s: ..., memory_bytes: ...}` that
            makes devices named d0, d1, ...; an entry of a list may have a count as well, and is then named
            after its name or its preset: `[{preset: jetson-nano, count: 3}]` makes jetson-nano-0, -1 and -2.
        links: between the client's devices.
        uplink: between each device and the coordinator.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    devices: tuple[Device, ...] = Field(min_length=1)
    links: Links = Field(default_factory=Links)
    uplink: Link = Field(default_factory=lambda: Link(bandwidth_bytes_per_s=12.5e6, latency_s=1e-2))

    @model_validator(mode="before")
    @classmethod
    def _expand_devices(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("devices"), Mapping):
            values = {**values, "devices": _expand(values["devices"], prefix="d")}
        elif isinstance(values, Mapping) and isinstance(values.get("devices"), int):
            values = {**values, "devices": _expand({"count": values["devices"]}, prefix="d")}
        elif isinstance(values, Mapping) and isinstance(values.get("devices"), Sequence):
            values = {**values, "devices": [each for entry in values["devices"] for each in _several(entry)]}
        return values

    @model_validator(mode="after")
    def _names_are_unique(self) -> Client:
        _check_unique([device.name for device in self.devices], f"devices of client {self.name!r}")
        return self


class Topology(Component):
    """All clients of a job.

    Args:
        name: shown in reports.
        clients: the clients, or a shorthand `{count: 10, devices: ..., ...}` that makes clients named
            c0, c1, ...
    """

    name: str = "topology"
    clients: tuple[Client, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _expand_clients(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("clients"), Mapping):
            first, *others = _expand(values["clients"], prefix="c")
            model = Client.model_validate(first)  # checked once: there may be 100,000 of them
            named = (model.model_copy(update={"name": fields["name"]}) for fields in others)
            values = {**values, "clients": (model, *named)}
        return values

    @model_validator(mode="after")
    def _names_are_unique(self) -> Topology:
        _check_unique([client.name for client in self.clients], "clients")
        return self

    @property
    def num_devices(self) -> int:
        """Devices of all clients together."""
        return sum(len(client.devices) for client in self.clients)


def _expand(shorthand: Mapping[str, Any], *, prefix: str) -> list[dict[str, Any]]:
    fields = dict(shorthand)
    count = TypeAdapter(int).validate_python(fields.pop("count", None))
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    return [{"name": f"{prefix}{index}", **fields} for index in range(count)]


def _several(entry: Any) -> Sequence[Any]:
    """The devices that one entry of a list stands for."""
    if not isinstance(entry, Mapping):
        return [entry]
    name = entry.get("name", entry.get("preset"))
    if "count" not in entry:
        return [{**entry, "name": name} if name is not None else entry]
    return _expand({key: value for key, value in entry.items() if key != "name"}, prefix=f"{name or 'd'}-")


def _fill_in(values: Any, fields_of: Callable[[str], dict[str, Any]]) -> Any:
    """The fields of a preset, where one is named, and beside them what else is given."""
    if not isinstance(values, Mapping) or "preset" not in values:
        return values
    rest = {key: value for key, value in values.items() if key != "preset"}
    return {**fields_of(values["preset"]), **rest}


def _check_unique(names: Sequence[str], what: str) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{what} must have different names, but {', '.join(twice)} occurs more than once")
