"""Presets: published figures, and topologies that name them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fedmp import Client, Device, Link, Links, Topology
from fedmp.cli import main
from fedmp.presets import DEVICES, LINKS


@pytest.mark.parametrize(
    ("name", "peak_flops_per_s", "memory_gib"),
    [
        ("jetson-nano", 236e9, 4),
        ("jetson-tx2", 750e9, 8),
        ("jetson-xavier-nx", 845e9, 8),
        ("raspberry-pi-4", 4 * 8 * 1.5e9, 4),
        ("raspberry-pi-5", 4 * 16 * 2.4e9, 8),
        ("a100", 19.5e12, 40),
    ],
)
def test_a_preset_has_the_published_figures(name: str, peak_flops_per_s: float, memory_gib: int) -> None:
    preset = DEVICES[name]
    assert preset.peak_flops_per_s == pytest.approx(peak_flops_per_s)
    assert preset.memory_bytes == memory_gib << 30


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_like_a_preset_has_its_sustained_speed_and_its_memory(name: str) -> None:
    device, preset = Device.like(name, name="d"), DEVICES[name]
    assert device.flops_per_s == preset.peak_flops_per_s * preset.sustained
    assert device.memory_bytes == preset.memory_bytes
    assert 0 < preset.sustained < 1
    assert preset.source


@pytest.mark.parametrize("name", LINKS)
def test_a_link_like_a_preset_counts_in_bytes(name: str) -> None:
    link, preset = Link.like(name), LINKS[name]
    assert link.bandwidth_bytes_per_s == preset.peak_bits_per_s * preset.sustained / 8
    assert link.latency_s == preset.latency_s
    assert preset.source


def test_a_list_of_presets_with_counts_makes_numbered_devices() -> None:
    client = Client(name="lab", devices=[{"preset": "jetson-nano", "count": 3}, {"preset": "desktop"}])
    names = [device.name for device in client.devices]
    assert names == ["jetson-nano-0", "jetson-nano-1", "jetson-nano-2", "desktop"]
    assert [device.memory_bytes >> 30 for device in client.devices] == [4, 4, 4, 32]


def test_a_name_goes_before_the_preset_and_so_does_any_field() -> None:
    client = Client(
        name="lab",
        devices=[
            {"preset": "jetson-nano", "count": 2, "name": "nano"},
            {"preset": "laptop", "name": "x", "flops_per_s": 1e9},
        ],
    )
    assert [device.name for device in client.devices] == ["nano-0", "nano-1", "x"]
    assert client.devices[2] == Device("x", flops_per_s=1e9, memory_bytes=16 << 30)


def test_the_shorthands_for_many_take_presets() -> None:
    topology = Topology(clients={"count": 10, "devices": {"preset": "jetson-nano", "count": 5}})
    assert topology.num_devices == 50
    assert topology.clients[9].devices[4] == Device.like("jetson-nano", name="d4")


def test_links_are_presets_by_name_or_with_fields_of_their_own() -> None:
    client = Client.model_validate(
        {
            "name": "lab",
            "devices": 2,
            "uplink": "wan-100",
            "links": {
                "default": {"preset": "lan-1000"},
                "pairs": {"d0,d1": {"preset": "wifi", "latency_s": 0}},
            },
        }
    )
    assert client.uplink == Link.like("wan-100")
    assert client.links.default == Link.like("lan-1000")
    assert client.links.between("d1", "d0") == Link(Link.like("wifi").bandwidth_bytes_per_s, 0.0)
    assert Links(default=Link.like("4g")).default == Link.like("4g")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": [{"preset": "jetson-nona"}]}, "did you mean jetson-nano?"),
        ({"devices": 1, "uplink": "wan-1"}, "did you mean wan-10?"),
        ({"devices": 1, "uplink": {"preset": "lan-100", "speed": 3}}, "speed"),
        ({"devices": [{"preset": "laptop", "count": 0}]}, "count is 0"),
        ({"devices": [{"preset": "laptop"}, {"preset": "laptop"}]}, "laptop occurs more than once"),
    ],
)
def test_a_preset_that_does_not_exist_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Client.model_validate({"name": "lab", **fields})


def test_the_command_line_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*DEVICES, *LINKS])
    assert main(["presets", "all"]) == 2


def test_the_topology_of_the_documentation_is_one() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "topologies.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    topologies = [Topology.model_validate(yaml.safe_load(block)) for block in blocks]
    assert [topology.num_devices for topology in topologies] == [5, 6]
