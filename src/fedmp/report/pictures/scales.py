"""Axes of seconds and bytes in one unit that suits their length."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter

__all__ = ["bytes_axis", "seconds_axis"]

_SECONDS = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_LEAST = 2.0  # of a unit, for it to be used


def seconds_axis(axis: Any, end_s: float) -> str:
    """Let an axis of seconds show another unit.

    Args:
        axis: of matplotlib, such as `axes.xaxis`.
        end_s: its end.

    Returns:
        The unit's name.
    """
    return _in_unit(axis, end_s, _SECONDS)


def bytes_axis(axis: Any, end: float) -> str:
    """Let an axis of bytes show another unit; see `seconds_axis`."""
    return _in_unit(axis, end, _BYTES)


def _in_unit(axis: Any, end: float, units: tuple[tuple[float, str], ...]) -> str:
    size, name = next((unit for unit in units if end >= _LEAST * unit[0]), units[-1])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:g}"))
    return name
