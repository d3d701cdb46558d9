"""Devices and links by name, from published hardware: what `preset: jetson-nano` in a topology stands for.

A data sheet gives peaks; training reaches a part of them. Each preset states its peak, the share of it that a
training run is assumed to sustain, and where the figures come from; the product is what plans count with. Shares
are assumptions: about 0.4 for GPUs and 0.5 for large CPU cores in FP32 convolutions and matrix products of
medium size, less for small boards, which throttle and wait for memory. Who knows better for a model of theirs sets
`flops_per_s` beside the preset.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["DEVICES", "LINKS", "DevicePreset", "LinkPreset", "device_fields", "link_fields"]

T = TypeVar("T")

_GIB = 1 << 30


@dataclass(frozen=True)
class DevicePreset:
    """A device that can be bought.

    Attributes:
        peak_flops_per_s: FP32, of the data sheet or as cores x operations a cycle x clock.
        sustained: share of the peak that training is assumed to reach, 0 to 1.
        memory_bytes: of the whole device.
        source: of peak and memory.
    """

    peak_flops_per_s: float
    sustained: float
    memory_bytes: int
    source: str

    @property
    def flops_per_s(self) -> float:
        """Sustained FP32 training throughput."""
        return self.peak_flops_per_s * self.sustained


@dataclass(frozen=True)
class LinkPreset:
    """A kind of network link; both directions alike, so that of an uneven one it is the slower.

    Attributes:
        peak_bits_per_s: bits (not bytes) a second, as the link is sold.
        sustained: share of them that a large transfer's bytes get, 0 to 1.
        latency_s: seconds one way.
        source: of these figures.
    """

    peak_bits_per_s: float
    sustained: float
    latency_s: float
    source: str

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Sustained bytes a second."""
        return self.peak_bits_per_s * self.sustained / 8


DEVICES: Mapping[str, DevicePreset] = {
    "jetson-nano": DevicePreset(
        236e9,
        0.4,
        4 * _GIB,
        "NVIDIA Jetson Nano module data sheet: 128 Maxwell cores x 2 x 921.6 MHz (472 GFLOP/s in FP16), 4 GB LPDDR4",
    ),
    "jetson-tx2": DevicePreset(
        750e9,
        0.4,
        8 * _GIB,
        "NVIDIA Jetson TX2 module data sheet: 256 Pascal cores x 2 x 1.465 GHz (1.5 TFLOP/s in FP16), 8 GB LPDDR4",
    ),
    "jetson-xavier-nx": DevicePreset(
        845e9,
        0.4,
        8 * _GIB,
        "NVIDIA Jetson Xavier NX module data sheet: 384 Volta cores x 2 x 1.1 GHz, without tensor cores; 8 GB LPDDR4x",
    ),
    "raspberry-pi-4": DevicePreset(
        48e9,
        0.25,
        4 * _GIB,
        "Raspberry Pi 4B product brief: 4 Cortex-A72 at 1.5 GHz, one 128-bit FMA a cycle (8 operations); 4 GB model. "
        "HPL in FP64 reaches about 8 of 24 GFLOP/s (feiereisen.net, 2022)",
    ),
    "raspberry-pi-5": DevicePreset(
        153.6e9,
        0.25,
        8 * _GIB,
        "Raspberry Pi 5 product brief: 4 Cortex-A76 at 2.4 GHz, two 128-bit FMA a cycle (16 operations); 8 GB model",
    ),
    "laptop": DevicePreset(
        358e9,
        0.4,
        16 * _GIB,
        "Intel ARK, Core i7-1165G7: 4 cores at 2.8 GHz, 32 FP32 operations a cycle; 16 GB as commonly sold",
    ),
    "desktop": DevicePreset(
        973e9,
        0.5,
        32 * _GIB,
        "AMD, Ryzen 7 5800X: 8 cores at 3.8 GHz, two 256-bit FMA a cycle (32 operations); 32 GB as commonly sold",
    ),
    "workstation": DevicePreset(
        12.7e12,
        0.4,
        12 * _GIB,
        "NVIDIA, GeForce RTX 3060: 3,584 cores x 2 x 1.777 GHz, 12 GB GDDR6",
    ),
    "a100": DevicePreset(
        19.5e12,
        0.5,
        40 * _GIB,
        "NVIDIA A100 data sheet: 19.5 TFLOP/s in FP32 without TF32, 40 GB HBM2",
    ),
}

LINKS: Mapping[str, LinkPreset] = {
    "lan-100": LinkPreset(
        100e6,
        0.94,
        3e-4,
        "IEEE 802.3u; TCP carries 1,448 of a frame's 1,538 bytes; latency of a switched office network",
    ),
    "lan-1000": LinkPreset(1e9, 0.94, 2e-4, "IEEE 802.3ab; as lan-100"),
    "lan-10000": LinkPreset(10e9, 0.94, 5e-5, "IEEE 802.3an; as lan-100, within a rack"),
    "wifi": LinkPreset(
        300e6,
        0.5,
        3e-3,
        "IEEE 802.11n, two streams at 40 MHz: 300 Mbit/s; about half is left for TCP by preambles, acknowledgements "
        "and contention",
    ),
    "4g": LinkPreset(
        50e6,
        0.2,
        2.5e-2,
        "3GPP TS 36.306, LTE category 4: 50 Mbit/s up (150 down); measured uplinks are around 10 Mbit/s, round trips "
        "around 50 ms (Ookla and Opensignal country reports)",
    ),
    "wan-10": LinkPreset(10e6, 0.9, 2e-2, "a 10 Mbit/s line to another city, round trip 40 ms"),
    "wan-100": LinkPreset(100e6, 0.9, 2e-2, "a 100 Mbit/s line to another city, round trip 40 ms"),
    "wan-1000": LinkPreset(1e9, 0.9, 1e-2, "a 1 Gbit/s line to a data centre nearby, round trip 20 ms"),
}


def device_fields(preset: str) -> dict[str, Any]:
    """The fields of a `Device` that a preset gives.

    Raises:
        ValueError: there is no such preset; the message names near ones.
    """
    found = _find(DEVICES, preset, "device")
    return {"flops_per_s": found.flops_per_s, "memory_bytes": found.memory_bytes}


def link_fields(preset: str) -> dict[str, Any]:
    """The fields of a `Link` that a preset gives.

    Raises:
        ValueError: there is no such preset; the message names near ones.
    """
    found = _find(LINKS, preset, "link")
    return {"bandwidth_bytes_per_s": found.bandwidth_bytes_per_s, "latency_s": found.latency_s}


def _find(presets: Mapping[str, T], name: str, what: str) -> T:
    if name in presets:
        return presets[name]
    near = difflib.get_close_matches(str(name), presets, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(presets)}"
    raise ValueError(f"no {what} preset is called {name!r}; {hint}")
