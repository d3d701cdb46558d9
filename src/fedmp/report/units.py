"""Numbers as people read them: bytes, memory, seconds, counts and shares as short ASCII text."""

from __future__ import annotations

import math

__all__ = [
    "format_bytes",
    "format_count",
    "format_loss",
    "format_memory",
    "format_range",
    "format_seconds",
    "format_share",
    "memory_unit",
    "printable",
    "shorten",
    "shorten_layer",
    "visible",
]

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SHORT = ("", "k", "M", "G", "T", "P")


def format_bytes(num_bytes: float) -> str:
    """Traffic in decimal units, as networks are sold.

    Args:
        num_bytes: bytes, at least 0.

    Returns:
        Three figures at most, such as `"1.2 MB"` for 1 234 567.
    """
    return _scaled(num_bytes, 1000.0, _DECIMAL)


def format_memory(num_bytes: float) -> str:
    """Memory in binary units, as it is built.

    Args:
        num_bytes: bytes, at least 0.

    Returns:
        Three figures at most, such as `"4.0 GiB"` for `4 << 30`.
    """
    return _scaled(num_bytes, 1024.0, _BINARY)


def format_seconds(seconds: float) -> str:
    """A duration in the unit that suits its size.

    Args:
        seconds: at least 0.

    Returns:
        From `"0.85 ms"` over `"4.1 s"` and `"3 min 05 s"` to `"2 d 04 h"`; `"-"` if it is not finite.
    """
    if not math.isfinite(seconds):
        return "-"
    if seconds <= 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{_figures(seconds * 1000)} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600:02d} h"


def format_count(count: float) -> str:
    """A count, in full while it is short.

    Args:
        count: at least 0.

    Returns:
        `"9,876"` below 100 000, `"1.2 M"` and the like above.
    """
    if not math.isfinite(count):
        return "-"
    return f"{round(count):,}" if abs(count) < 99_999.5 else _scaled(count, 1000.0, _SHORT)


def format_share(share: float | None) -> str:
    """A share as a percentage.

    Args:
        share: from 0 to 1; None for unknown.

    Returns:
        Such as `"83.1 %"`; `"-"` if it is unknown or not finite.
    """
    return "-" if share is None or not math.isfinite(share) else f"{share * 100:.1f} %"


def format_loss(loss: float | None) -> str:
    """A loss with three decimals.

    Args:
        loss: any value; None for unknown.

    Returns:
        Such as `"0.612"`; three figures with an exponent if it is large; `"-"` if it is unknown.
    """
    if loss is None:
        return "-"
    return f"{loss:.3f}" if abs(loss) < 1000 or not math.isfinite(loss) else f"{loss:.2e}"


def format_range(names: tuple[str, ...]) -> str:
    """A run of names by its ends.

    Args:
        names: in order; empty for none.

    Returns:
        The only name, or `"first .. last"`.
    """
    if not names:
        return "-"
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"


def memory_unit(num_bytes: float) -> tuple[float, str]:
    """Choose one binary unit for a column of figures.

    Args:
        num_bytes: the largest of them.

    Returns:
        The unit's size in bytes and its name.
    """
    power = 0
    while num_bytes >= 1024 and power < len(_BINARY) - 1:
        num_bytes /= 1024
        power += 1
    return 1024.0**power, _BINARY[power]


def shorten(text: str, width: int, mark: str = "…") -> str:
    """Cut the middle out of a text that is too long; names differ at their ends more than within.

    Args:
        text: one line.
        width: the most characters, more than `mark` has.
        mark: stands for what was cut out.

    Returns:
        The text, or its beginning and end around the mark.
    """
    if len(text) <= width:
        return text
    kept = width - len(mark)
    tail = kept // 3
    return text[: kept - tail] + mark + text[len(text) - tail :]


def shorten_layer(name: str, width: int, mark: str = "…") -> str:
    """Shorten a dotted name evenly in all its parts, so that the numbers in it stay readable.

    Args:
        name: such as `"encoder.layers.3.feed_forward"`.
        width: the most characters, more than `mark` has.
        mark: stands for what is cut out of a name of very many parts.

    Returns:
        The name, or such as `"enco.laye.3.feed"`.
    """
    parts = name.split(".")
    kept = max(len(part) for part in parts)
    while len(name) > width and kept > 1:
        kept -= 1
        name = ".".join(part if part.isdigit() else part[:kept].rstrip("_") or part[:kept] for part in parts)
    return shorten(name, width, mark)


def printable(text: str) -> str:
    """Take control characters out of a text that others wrote, so that it cannot steer a terminal.

    Args:
        text: any text.

    Returns:
        The text with a space for each of them.
    """
    return "".join(char if char.isprintable() else " " for char in text)


def visible(name: str) -> str:
    """Make a name that is white space or control characters, such as a line end, one that can be seen.

    Args:
        name: of a label, say.

    Returns:
        The name, or its Python literal.
    """
    return name if name.isprintable() and name.strip() else repr(name)


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return "-"
    power = 0
    while abs(value) >= base * 0.9995 and power < len(units) - 1:
        value /= base
        power += 1
    number = f"{round(value)}" if power == 0 else _figures(value)
    return f"{number} {units[power]}".rstrip()


def _figures(value: float) -> str:
    """At least two figures: 0.012, 0.85, 4.2, 57, 812."""
    size = abs(value)
    if size >= 99.5:
        return f"{value:.0f}"
    if size >= 0.9995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.0995 else f"{value:.2g}"
