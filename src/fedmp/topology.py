"""Who takes part: clients, their devices, and the links between them.

A topology comes from a YAML file of the `topology` config group or from Python, and goes to the
planner (devices and links of one client) and to the engines (all of it). Speeds are sustained FP32
throughput in training, not the data sheet's peak. A device or link may name a preset of published hardware.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, overload

from pydantic import ByteSize, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, core_schema

from fedmp.component import Component
from fedmp.presets import device_fields, link_fields

__all__ = ["Client", "ClientGroup", "ClientList", "Device", "Link", "Links", "Topology"]


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


@dataclasses.dataclass(frozen=True)
class ClientGroup:
    """Clients that differ in nothing but their names.

    Attributes:
        first: the first of them.
        count: how many there are.
        prefix: the others are called so, with a number behind: 1, 2, ...
    """

    first: Client
    count: int = 1
    prefix: str = ""

    def name(self, index: int) -> str:
        """The name of one of them."""
        return f"{self.prefix}{index}" if index else self.first.name

    def client(self, index: int) -> Client:
        """One of them."""
        return self.first.model_copy(update={"name": self.name(index)}) if index else self.first


class ClientList(Sequence[Client]):
    """The clients of a topology, in order: of those that are alike one is held, however many there are.

    Args:
        groups: of clients, whose names are all different.

    Attributes:
        groups: the same.
        names: of all clients, in order, made when they are asked for.

    Example:
        >>> clients = Topology(clients={"count": 100_000, "devices": 1}).clients
        >>> len(clients), clients[99_999].name, clients.place("c99999")
        (100000, 'c99999', 99999)
    """

    def __init__(self, groups: Sequence[ClientGroup]) -> None:
        self.groups = tuple(groups)
        self.names: Sequence[str] = _Names(self)
        self._starts = [0, *accumulate(group.count for group in groups)]
        self._by_name = {group.first.name: number for number, group in enumerate(groups)}
        self._by_prefix = {group.prefix: number for number, group in enumerate(groups) if group.count > 1}
        names = [group.first.name for group in groups]
        again = [name for name in names if self._numbered(name) not in (None, self.place(name))]
        _check_unique([*names, *again], "clients")

    def group(self, place: int) -> int:
        """The number of the group that the client at a place is of."""
        return bisect_right(self._starts, place) - 1

    def place(self, name: str) -> int:
        """The place of a client.

        Raises:
            KeyError: there is none of this name.
        """
        if name in self._by_name:
            return self._starts[self._by_name[name]]
        place = self._numbered(name)
        if place is None:
            raise KeyError(name)
        return place

    def _numbered(self, name: str) -> int | None:
        """The place of a client that is called by a prefix and a number; None if there is none."""
        prefix = name.rstrip("0123456789")
        number, digits = self._by_prefix.get(prefix), name[len(prefix) :]
        if number is None or not digits or (digits[0] == "0" and digits != "0"):
            return None
        index = int(digits)
        return self._starts[number] + index if index < self.groups[number].count else None

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, place: int) -> Client: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Client, ...]: ...

    def __getitem__(self, place: int | slice) -> Client | tuple[Client, ...]:
        if isinstance(place, slice):
            return tuple(self[each] for each in range(*place.indices(len(self))))
        group, index = self._find(place)
        return group.client(index)

    def __iter__(self) -> Iterator[Client]:
        return (group.client(index) for group in self.groups for index in range(group.count))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ClientList) and self.groups == other.groups:
            return True
        return (
            isinstance(other, Sequence) and len(self) == len(other) and all(map(Client.__eq__, self, other))
        )

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"({shown}, ... {len(self)} in all)" if len(self) > 3 else f"({shown})"

    def _find(self, place: int) -> tuple[ClientGroup, int]:
        """The group of the client at a place, and which of it the client is."""
        if 0 <= place < self._starts[1]:  # of most topologies all clients
            return self.groups[0], place
        if not -len(self) <= place < len(self):
            raise IndexError(f"there is no client {place}; there are {len(self)}")
        place %= len(self)
        number = self.group(place)
        return self.groups[number], place - self._starts[number]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        each = handler.generate_schema(Annotated[tuple[Client, ...], Field(min_length=1)])
        return core_schema.no_info_wrap_validator_function(
            _client_list,
            each,
            serialization=core_schema.wrap_serializer_function_ser_schema(
                lambda clients, write: write(tuple(clients)), schema=each
            ),
        )


def _client_list(value: Any, check: Callable[[Any], tuple[Client, ...]]) -> ClientList:
    """The clients of a shorthand, or of a list of clients and shorthands."""
    if isinstance(value, ClientList):
        return value
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        return ClientList([ClientGroup(client) for client in check(entries)])
    counted = [_counted(entry, is_shorthand=isinstance(value, Mapping)) for entry in entries]
    firsts = check([entry for entry, _, _ in counted])  # each is checked once, however many are like it
    return ClientList(
        [ClientGroup(c, count, prefix) for c, (_, count, prefix) in zip(firsts, counted, strict=True)]
    )


def _counted(entry: Any, *, is_shorthand: bool) -> tuple[Any, int, str]:
    """The first of the clients that an entry stands for, how many they are, and what their names begin with."""
    if not isinstance(entry, Mapping) or not (is_shorthand or "count" in entry):
        return entry, 1, ""
    prefix = f"{entry['name']}-" if "name" in entry else "c"
    fields = {key: value for key, value in entry.items() if key != "count"}
    return {**fields, "name": f"{prefix}0"}, _count_of(entry), prefix


class _Names(Sequence[str]):
    """The names of clients, in order."""

    def __init__(self, clients: ClientList) -> None:
        self._clients = clients
        self._first = clients.groups[0]

    def __len__(self) -> int:
        return len(self._clients)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...

    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, int) and 0 <= place < self._first.count:  # of most topologies all clients
            return self._first.name(place)
        if isinstance(place, slice):
            return tuple(self[each] for each in range(*place.indices(len(self))))
        group, index = self._clients._find(place)
        return group.name(index)

    def __iter__(self) -> Iterator[str]:
        return (group.name(index) for group in self._clients.groups for index in range(group.count))

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self._clients.place(name) >= 0
        except KeyError:
            return False


class Topology(Component):
    """All clients of a job.

    Args:
        name: shown in reports.
        clients: the clients, or a shorthand `{count: 10, devices: ..., ...}` that makes clients named
            c0, c1, ...; an entry of a list may have a count as well, and is then named after its name:
            `[{name: phone, count: 900, ...}, {name: laptop, count: 100, ...}]` makes phone-0 to laptop-99.
    """

    name: str = "topology"
    clients: ClientList

    @property
    def num_devices(self) -> int:
        """Devices of all clients together."""
        return sum(group.count * len(group.first.devices) for group in self.clients.groups)


def _expand(shorthand: Mapping[str, Any], *, prefix: str) -> list[dict[str, Any]]:
    fields = {key: value for key, value in shorthand.items() if key != "count"}
    return [{"name": f"{prefix}{index}", **fields} for index in range(_count_of(shorthand))]


def _count_of(shorthand: Mapping[str, Any]) -> int:
    count = TypeAdapter(int).validate_python(shorthand.get("count"))
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    return count


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
