"""What all pictures have in common: colors, letters, and how they are written."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vision.support.files import replacing
from mergekit_vision.support.terminal import harmless

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRAY, RULE = "#24292f", "#6b7280", "#d5d9e0"
COLORS = {"backbone": "#9aa1ab", "static": "#3a6ea5", "dynamic": "#d07a2d", "oracle": "#8d6cab", "experts": "#2d7d5f"}
LINES = ("#3a6ea5", "#d07a2d", "#2d7d5f", "#a5487a", "#7a6bb8", "#8a7a2d", "#4aa5a5", "#b8483a", "#6b7280")
WIDTH = 5.2  # inches: readable when it is shrunk to a phone's width
_LEGEND = 78  # letters across a figure of that width
_ROW = 0.18  # inches of a row of a legend
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GRAY,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a name with $ in it is no formula
    "svg.hashsalt": "mergekit-vision",  # the same picture, the same file
}
LONGEST_NAME = 32  # letters; more leave no room for what is drawn
_STROKES = ("solid", "dashed", "dotted")


@contextmanager
def empty_figure(width: float, height: float) -> Iterator["Figure"]:
    """An empty figure in inches, and its style while it is filled."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _drawing() -> Iterator[None]:
    """How a figure is written. Letters that the font lacks become boxes, without a word."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context({key: _STYLE[key] for key in ("svg.hashsalt", "text.parse_math")}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def named(name: str, letters: int = LONGEST_NAME) -> str:
    """A name as it stands in a figure, where there is room for a few letters."""
    name = harmless(name)
    name = f"\u200b{name}" if name.startswith("_") else name  # which matplotlib would leave out of legends
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def strokes() -> Iterator[dict[str, Any]]:
    """Color and line style of one line after the other, without end; the first 27 are all different."""
    for style in cycle(_STROKES):
        for color in LINES:
            yield {"color": color, "linestyle": style}


def legend(figure: "Figure", labels: Sequence[str]) -> None:
    """Name the lines of a figure above it, in as many columns as their names leave room for; the figure grows by the rows."""
    columns = max(1, min(3, _LEGEND // (8 + max(map(len, labels), default=0))))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _ROW * -(-len(labels) // columns))
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with replacing(path) as draft, _drawing():
        figure.savefig(draft, dpi=150)


def as_svg(figure: "Figure") -> bytes:
    """A figure as an SVG document."""
    buffer = io.BytesIO()
    with _drawing():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
