"""Small marks for tables: a bar, a spark line, a strip of shades, as rich text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

__all__ = ["bar", "heat_cell", "shade_strip", "spark_line"]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"
_SHADES = "░▒▓█"
# From a dark to a bright blue: ordered by lightness, so it survives colour blindness and grey prints.
_HEAT = ("#1d3d5c", "#1f4e79", "#226199", "#2a77b5", "#4a94cc", "#74b2dd", "#a3cfec")


def bar(share: float, width: int, style: str = "cyan") -> Text:
    """A horizontal bar.

    Args:
        share: how much of it is full; clipped to 0 .. 1, and nothing where it is not finite.
        width: characters, at least 1.
        style: rich style of the full part.

    Returns:
        Text of exactly `width` characters, in steps of an eighth of a character.
    """
    share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    full, rest = divmod(eighths, 8)
    filled = "█" * full + (_EIGHTHS[rest] if rest else "")
    return Text(filled, style=style).append("·" * (width - len(filled)), style="bright_black")


def spark_line(values: Sequence[float], width: int, style: str = "green") -> Text:
    """A line of values, one character each, between its own least and greatest value.

    Args:
        values: in order; those that are not finite are left blank.
        width: the most characters; longer series are thinned, and the last value always stays.
        style: rich style.

    Returns:
        Text of at most `width` characters; empty for no values.
    """
    shown = _thinned(values, width)
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return Text()
    low, span = min(finite), max(finite) - min(finite)
    marks = [_level(value, low, span) for value in shown]
    return Text("".join(marks), style=style)


def heat_cell(share: float, peak: float) -> Text:
    """A percentage on a background that is the brighter the larger it is.

    Args:
        share: from 0 to 1.
        peak: the share with the brightest background, above 0.

    Returns:
        Right-aligned text of four characters; a dot for none.
    """
    if share <= 0:
        return Text("  · ", style="bright_black")
    level = min(int(share / peak * len(_HEAT)), len(_HEAT) - 1)
    ink = "white" if level < 4 else "black"
    number = "<1" if share < 0.005 else f"{share * 100:.0f}"
    return Text(f"{number:>3} ", style=f"{ink} on {_HEAT[level]}")


def shade_strip(shares: Sequence[float], width: int, peak: float) -> Text:
    """One shaded character for each share, or for each group of neighbours where they do not fit.

    Args:
        shares: in order, each from 0 to 1.
        width: the most characters, at least 1.
        peak: the share with the darkest shade, above 0.

    Returns:
        Text of at most `width` characters; each shows the largest share of its group.
    """
    text = Text()
    for group in _groups(shares, width):
        share = max(group)
        # The root spreads out the many small shares that a few large ones would flatten.
        part = math.sqrt(min(max(share / peak, 0.0), 1.0))
        heat = _HEAT[min(int(part * len(_HEAT)), len(_HEAT) - 1)]
        text.append(
            _SHADES[min(int(part * 4), 3)] if share > 0 else "·", style=heat if share > 0 else "bright_black"
        )
    return text


def _thinned(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    if width == 1:
        return [values[-1]]
    step = (len(values) - 1) / (width - 1)
    return [values[round(index * step)] for index in range(width)]


def _level(value: float, low: float, span: float) -> str:
    if not math.isfinite(value):
        return " "
    share = (value - low) / span if span > 0 else 0.5
    return _LEVELS[min(int(share * len(_LEVELS)), len(_LEVELS) - 1)]


def _groups(values: Sequence[float], width: int) -> list[Sequence[float]]:
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)] if count else []
    return [values[start:stop] for start, stop in pairwise(edges)]
