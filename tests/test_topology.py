"""Topologies: shorthands, checks, and the ones that come with fedmp."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fedmp import Client, Device, Link, Links, Topology

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "topology"


def test_a_count_makes_numbered_devices_with_the_same_fields() -> None:
    client = Client(name="lab", devices={"count": 3, "flops_per_s": 1e9, "memory_bytes": "2 GiB"})
    assert [device.name for device in client.devices] == ["d0", "d1", "d2"]
    assert {(device.flops_per_s, device.memory_bytes) for device in client.devices} == {(1e9, 2 << 30)}


def test_a_number_of_devices_is_enough() -> None:
    assert [device.name for device in Client(name="lab", devices=2).devices] == ["d0", "d1"]


def test_a_count_makes_numbered_clients() -> None:
    topology = Topology(clients={"count": 10, "devices": {"count": 5}})
    assert [client.name for client in topology.clients] == [f"c{index}" for index in range(10)]
    assert topology.num_devices == 50


@pytest.mark.parametrize(("text", "size"), [("4 GiB", 4 << 30), ("512MB", 512_000_000), (1024, 1024)])
def test_memory_is_a_number_of_bytes_or_has_a_unit(text: str | int, size: int) -> None:
    assert Device("d", memory_bytes=text).memory_bytes == size


def test_a_pair_has_its_own_link_in_either_order() -> None:
    slow = Link(bandwidth_bytes_per_s=1e6, latency_s=0.1)
    links = Links(pairs={"a,b": slow})
    assert links.between("a", "b") == links.between("b", "a") == slow
    assert links.between("a", "c") == Link()


def test_a_transfer_takes_latency_and_bytes_over_bandwidth() -> None:
    link = Link(bandwidth_bytes_per_s=1e6, latency_s=0.5)
    assert link.transfer_s(2e6) == 2.5
    assert link.transfer_s(0) == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clients": []}, "at least 1 item"),
        ({"clients": {"count": 0, "devices": 1}}, "count is 0; it must be at least 1"),
        ({"clients": [{"name": "a", "devices": []}]}, "at least 1 item"),
        ({"clients": [{"name": "a", "count": 0, "devices": 1}]}, "count is 0; it must be at least 1"),
        ({"clients": [{"name": "a", "count": 2, "devices": 1}] * 2}, "a-0 occurs more than once"),
        (
            {"clients": [{"name": "a", "count": 9, "devices": 1}, {"name": "a-3", "devices": 1}]},
            "a-3 occurs more",
        ),
        ({"clients": "everyone"}, "valid tuple"),
        ({"clients": [{"name": "a", "devices": 1}, {"name": "a", "devices": 1}]}, "a occurs more than once"),
        ({"clients": [{"name": "a", "devices": [{"name": "x"}, {"name": "x"}]}]}, "x occurs more than once"),
        ({"clients": [{"name": "../a", "devices": 1}]}, "should match pattern"),
        ({"clients": [{"name": "a.b", "devices": 1}]}, "should match pattern"),
        ({"clients": [{"name": "a", "devices": {"count": 1, "flops": 1}}]}, "flops"),
        ({"clients": [{"name": "a", "devices": {"count": 1, "flops_per_s": 0}}]}, "greater than 0"),
        ({"clients": [{"name": "a", "devices": {"count": 1, "memory_bytes": "4 apples"}}]}, "byte"),
        ({"clients": [{"name": "a", "devices": 1, "colour": "red"}]}, "colour"),
    ],
)
def test_a_topology_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Topology.model_validate(fields)


@pytest.mark.parametrize(
    ("name", "devices"),
    [("three_labs", [2, 2, 2]), ("one_client_four_devices", [4]), ("uneven", [3, 2]), ("paper50", [5] * 10)],
)
def test_a_topology_that_comes_with_fedmp_has_the_devices_that_it_says(name: str, devices: list[int]) -> None:
    topology = Topology.model_validate(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    assert topology.name == name
    assert [len(client.devices) for client in topology.clients] == devices


def test_uneven_devices_differ_in_speed_by_ten() -> None:
    topology = Topology.model_validate(yaml.safe_load((CONFIGS / "uneven.yaml").read_text()))
    speeds = [device.flops_per_s for device in topology.clients[0].devices]
    assert max(speeds) / min(speeds) == 10


def test_many_clients_share_their_devices_and_are_made_when_asked_for() -> None:
    clients = Topology(clients={"count": 100_000, "devices": {"count": 2}}).clients
    assert clients[99_999].name == clients.names[-1] == "c99999"
    assert clients[99_999].devices is clients[0].devices
    assert len(clients.groups) == 1


def test_an_entry_of_the_clients_may_have_a_count() -> None:
    phone, laptop = {"flops_per_s": 1e9, "count": 1}, {"flops_per_s": 1e11, "count": 1}
    topology = Topology(
        clients=[
            {"name": "phone", "count": 12, "devices": phone},
            {"name": "phone-x", "devices": laptop},
            {"name": "laptop1", "count": 2, "devices": laptop},
        ]
    )
    expected = [*(f"phone-{index}" for index in range(12)), "phone-x", "laptop1-0", "laptop1-1"]
    assert list(topology.clients.names) == [client.name for client in topology.clients] == expected
    assert [client.devices[0].flops_per_s for client in topology.clients[10:]] == [1e9, 1e9, 1e11, 1e11, 1e11]
    assert topology.num_devices == 15
    assert (
        topology == Topology(clients=list(topology.clients)) == Topology.model_validate(topology.model_dump())
    )


def test_clients_are_found_by_their_names_and_no_others() -> None:
    clients = Topology(
        clients=[{"name": "a", "count": 11, "devices": 1}, {"name": "b", "devices": 1}]
    ).clients
    assert [clients.place(name) for name in clients.names] == list(range(12))
    for name in ("a", "a-", "a-11", "a-01", "a-00", "a-x", "b-0", "c0", "", "a-٣", "a-0\n"):
        assert name not in clients.names
        with pytest.raises(KeyError):
            clients.place(name)
    with pytest.raises(IndexError, match="no client 12"):
        clients[12]
