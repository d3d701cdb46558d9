"""What all pictures share: a clean figure that is saved whole, colours, and text that fits its place.

Figures use matplotlib's object interface, so no picture depends on a display or on pyplot's state. Colours
are told apart with any kind of colour vision: Okabe and Ito's set for kinds, Tol's muted set for labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath

from fedmp.report.files import write_atomically
from fedmp.report.units import shorten

__all__ = [
    "GREY",
    "INK",
    "KIND_COLORS",
    "LABEL_COLORS",
    "LIGHT",
    "STAGE_COLORS",
    "clean_axes",
    "fit_text",
    "ink_on",
    "picture",
    "text_width_in",
]

INK, GREY, LIGHT = "#222222", "#6b6b6b", "#e4e4e4"
KIND_COLORS = {
    "forward": "#0072b2",
    "backward": "#e69f00",
    "send": "#cc79a7",
    "exchange": "#56b4e9",
    "wait": "#dcdcdc",
    "step": "#009e73",
}
STAGE_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7f7f7f")
LABEL_COLORS = (
    "#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677",
    "#44aa99", "#882255", "#999933", "#aa4499", "#bbbbbb",
)  # fmt: skip
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.unicode_minus": False,
    # A dollar sign in a name is no formula.
    "text.parse_math": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    # Text stays text in an SVG: it can be searched, copied and read aloud.
    "svg.fonttype": "none",
    # The same input gives the same file.
    "svg.hashsalt": "fedmp",
}


@contextmanager
def picture(path: Path, width_in: float, height_in: float) -> Iterator[Figure]:
    """Draw inside the context; the file is written when it ends well, and only then.

    Args:
        path: ends in `.svg` or `.png`; its directory exists.
        width_in, height_in: size in inches.

    Yields:
        An empty figure.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise ValueError(f"a picture's name ends in .svg or .png, not {path.name!r}")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast("Any", _STYLE))
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        figure = Figure(figsize=(width_in, height_in), dpi=150, facecolor="white", layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        body = BytesIO()
        figure.savefig(body, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, body.getvalue())


def clean_axes(axes: Any, *, grid: str = "") -> None:
    """Leave only the lines that help to read values.

    Args:
        axes: matplotlib axes.
        grid: "x" or "y" for faint lines across that axis's ticks.
    """
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=3)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=LIGHT, linewidth=0.8)


def text_width_in(text: str, size_pt: float) -> float:
    """Measure a line of text.

    Args:
        text: one line.
        size_pt: its font size.

    Returns:
        Its width in inches.
    """
    return sum(_advance(char) for char in text) * size_pt / 72.0


def fit_text(
    text: str, width_in: float, size_pt: float, shortener: Callable[[str, int], str] = shorten
) -> str:
    """Shorten a line of text to the room there is.

    Args:
        text: one line.
        width_in: the room in inches.
        size_pt: the font size.
        shortener: makes a text of at most so many characters.

    Returns:
        The text, or its ends around an ellipsis; empty where not even three characters fit.
    """
    if text_width_in(text, size_pt) <= width_in:
        return text
    # No letter is narrower than a fifth of the font size, so a long text skips most lengths.
    longest = min(len(text) - 1, int(width_in * 72 / (0.2 * size_pt)))
    for length in range(longest, 2, -1):
        shorter = shortener(text, length)
        if text_width_in(shorter, size_pt) <= width_in:
            return shorter
    return ""


def ink_on(color: str) -> str:
    """Choose black or white text for a background.

    Args:
        color: any matplotlib colour.

    Returns:
        The one with more contrast.
    """
    red, green, blue = matplotlib.colors.to_rgb(color)
    return "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


@lru_cache(maxsize=4096)
def _advance(char: str) -> float:
    """Width of a character in points per point of font size."""
    # Bars on both sides, so that the blank around the character counts as well.
    font = FontProperties(family="DejaVu Sans")
    bars, whole = (TextPath((0, 0), text, size=100, prop=font) for text in ("||", f"|{char}|"))
    return float(whole.get_extents().width - bars.get_extents().width) / 100.0
