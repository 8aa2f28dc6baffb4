"""Charts of a page, drawn by matplotlib as SVG, 400 wide: about as many pixels as a phone.

What matplotlib cannot do is done to its SVG: text and lines that have no colour of their own take
the page's, so that they follow a reader into the dark, and letters are the reader's.
"""

import base64
import dataclasses
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from condconv.tools.reports.records import Points

Look = Mapping[str, Any]
"""How a curve looks, as matplotlib names it."""

# Okabe and Ito's colours, which people of every colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK = "#222222"  # of a file; in a page it is the page's
DASHES = ("-", "--", ":")
_MARKERS = "os^DvP"

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 200, 50, 18, 46, 44
_LINE = 17  # of the legend
_CHARACTERS = 42  # that fit into a line of the drawing in any usual font
_MOST_MARKERS = 10  # of a curve

_STYLE = {
    "figure.dpi": 72,  # so that a point is a unit of the drawing
    "path.simplify_threshold": 1.0,  # of a long run as many points as can be seen, peaks among them
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "condconv",  # the same run makes the same page
    "text.parse_math": False,  # a name is no formula
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.handlelength": 2.4,
    "legend.labelspacing": 0.4,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("text.color", "grid.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("font.size", "axes.labelsize", "legend.fontsize"), 12),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 12),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.unicode_minus"), False),
    **dict.fromkeys(("ytick.major.size", "legend.borderpad", "legend.borderaxespad"), 0),
    "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points that belong together.

    Attributes:
        points: (x, y); a y of None breaks the line.
        look: of them.
        intervals: (low, high) around each y, or nothing.
    """

    points: Points
    look: Look
    intervals: Sequence[tuple[float, float] | None] = ()


def look(number: int, dash: str = DASHES[0], hollow: bool = False) -> dict[str, Any]:
    """Returns the look of the curve of that number; 36 of them differ."""
    count = len(COLOURS)
    marker = _MARKERS[(number + number // count) % len(_MARKERS)]
    fill = "none" if hollow else "full"
    return {"color": COLOURS[number % count], "ls": dash, "marker": marker, "fillstyle": fill}


@matplotlib.rc_context(_STYLE)
def curves(
    title: str,
    x: str,
    y: str,
    drawn: Sequence[Curve],
    legend: Sequence[tuple[str, Look]] = (),
    bounds: tuple[float, float] | None = None,
    log: str = "",
) -> Figure:
    """Returns a chart of curves.

    Args:
        title, x, y: text above the drawing and at its axes.
        drawn: the curves.
        legend: text and look of each entry.
        bounds: lowest and highest y; None to follow the points.
        log: which axes, of "xy", are logarithmic where they span much.
    """
    axes = _axes(title, x, y, legend)
    for curve in drawn:
        _draw(axes, curve, bounds or (-math.inf, math.inf))
    if axes.lines:
        _limit(axes.xaxis, "x" in log)
        _limit(axes.yaxis, "y" in log)
    if bounds:
        axes.set_ylim(*bounds)
    return axes.figure


@matplotlib.rc_context(_STYLE)
def columns(title: str, x: str, y: str, parts: Mapping[str, tuple[str, Sequence[float]]]) -> Figure:
    """Returns a chart of stacked columns: colour of each part, and its height in all of them."""
    square = {"ls": "none", "marker": "s"}
    axes = _axes(title, x, y, [(name, {"color": c, **square}) for name, (c, _) in parts.items()])
    below: Any = 0
    for colour, heights in parts.values():
        above = below + np.array(heights, float)
        if any(heights):
            edges = np.arange(len(heights) + 1) + 0.5
            axes.stairs(above, edges, baseline=below, fill=True, color=colour, lw=0, gid="mark")
        below = above
    if axes.patches:
        axes.set(xlim=(0.5, len(below) + 0.5), ylim=(0, None))
    return axes.figure


def is_empty(figure: Figure) -> bool:
    """Returns whether nothing is drawn in a chart."""
    return not any(axes.lines or axes.patches for axes in figure.axes)


def svg(figure: Figure) -> str:
    """Returns a chart as an SVG file that stands in a page as well; ``INK`` is its colour."""
    content = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matplotlib's font lacks, the reader's may have
        figure.savefig(content, format="svg", metadata=nothing)
    text = content.getvalue()
    for pattern, by in _LEAN.items():
        text = re.sub(pattern, by, text)
    return text


_LEAN = {
    r"(?s)^.*?(?=<svg )": "",  # XML's own header
    r"\s*<g id=\"mark\"": '<g class="mark"',
    r"\s*<g id=\"[^\"]*\"": "<g",  # a page holds many charts, and a name only once
    r" font-family: [^;\"]*;": "",
    r"(\d\.\d\d)\d+(?=[\d. \nLMz-]*\")": r"\1",
    r"\s+(?=<)|\n": " ",
}


def address(drawing: str) -> str:
    """Returns the address under which a page holds an SVG as a file."""
    own = 'style="background: #fff; font-family: system-ui, sans-serif"'
    content = base64.b64encode(drawing.replace("<svg ", f"<svg {own} ", 1).encode()).decode()
    return f"data:image/svg+xml;base64,{content}"


def visible(value: object) -> str:
    """Returns text without what can be neither shown nor written."""
    text = str(value).encode("utf-8", "replace").decode()
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _axes(title: str, x: str, y: str, legend: Sequence[tuple[str, Look]]) -> Axes:
    """Returns the axes of a new chart, as high as its legend needs."""
    height = _TOP + _HEIGHT + _BOTTOM + _LINE * len(legend)
    figure = Figure((_WIDTH / 72, height / 72), label=title)
    figure.text(4 / _WIDTH, 1 - 16 / height, _fitting(title), size=13, weight="bold")
    figure.text(4 / _WIDTH, 1 - 34 / height, y)
    bottom, width = 1 - (_TOP + _HEIGHT) / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH
    axes = figure.add_axes((_LEFT / _WIDTH, bottom, width, _HEIGHT / height))
    axes.set_xlabel(x)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        axis.set_major_formatter(_number)
    handles = [Line2D([], [], **its_look) for _, its_look in legend]
    names = [_fitting(name) for name, _ in legend]
    place = (_LEFT / _WIDTH, bottom - _BOTTOM / height)
    figure.legend(handles, names, loc="upper left", bbox_to_anchor=place)
    return axes


def _draw(axes: Axes, curve: Curve, bounds: tuple[float, float]) -> None:
    xs, ys = np.array(curve.points, float).reshape(-1, 2).T
    ys = np.clip(ys, *bounds)
    if np.isfinite(ys).any():
        axes.plot(xs, ys, **curve.look, markevery=_marked(ys), clip_on=False, gid="mark")
    for x, interval in zip(xs, curve.intervals, strict=False):
        if interval:
            axes.plot([x, x], interval, color=curve.look["color"], marker="_", gid="mark")


_WITH_UNIT = EngFormatter(sep="")


def _number(value: float, _: int | None = None) -> str:
    return _WITH_UNIT(value) if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"


def _limit(axis: Axis, may_be_log: bool) -> None:
    """Sets an axis to what is drawn; 0 is in it unless all is far from it."""
    low, high = axis.get_data_interval()
    if may_be_log and 0 < 6 * low < high:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
        axis.set_major_formatter(_number)
        axis.set_minor_locator(NullLocator())
        axis.axes.set(**{f"{axis.axis_name}lim": (low / 1.2, high * 1.2)})
        return
    if low == high:
        low, high = low - (abs(low) or 1), high + (abs(high) or 1)
    elif 0 < low < 0.7 * high:
        low = 0
    if axis.axis_name == "y":
        low, high = axis.get_major_locator().tick_values(low, high)[[0, -1]]
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})


def _marked(ys: np.ndarray) -> list[int]:
    """Returns which points of a curve get a marker: some, the last among them."""
    finite = np.flatnonzero(np.isfinite(ys))[::-1]
    return finite[:: math.ceil(len(finite) / _MOST_MARKERS)].tolist()


def _fitting(text: str) -> str:
    """Returns as much of a text as fits into a line; wide characters count as two."""
    text = " ".join(visible(text).split())
    ends = np.cumsum([2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text])
    fitting = int(np.sum(ends <= _CHARACTERS))
    return text if fitting == len(text) else f"{text[: fitting - 1]}…"
