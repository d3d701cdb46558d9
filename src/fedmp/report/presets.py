"""The presets of devices and links as tables: what `fedmp presets` prints."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from fedmp.presets import DEVICES, LINKS
from fedmp.report.units import format_memory, format_seconds

__all__ = ["presets_tables"]


def presets_tables() -> Group:
    """Every preset with its figures and where they come from."""
    devices = _table("device", "peak FP32", "sustained", "memory")
    for name, device in DEVICES.items():
        devices.add_row(
            name,
            f"{device.peak_flops_per_s / 1e9:,.0f} GFLOP/s",
            f"{device.flops_per_s / 1e9:,.0f} GFLOP/s ({device.sustained:.0%})",
            format_memory(device.memory_bytes),
            device.source,
        )
    links = _table("link", "as sold", "sustained", "one way")
    for name, link in LINKS.items():
        links.add_row(
            name,
            f"{link.peak_bits_per_s / 1e6:,.0f} Mbit/s",
            f"{link.bandwidth_bytes_per_s * 8 / 1e6:,.0f} Mbit/s ({link.sustained:.0%})",
            format_seconds(link.latency_s),
            link.source,
        )
    return Group(devices, "", links)


def _table(first: str, *figures: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    table.add_column("source")
    return table
