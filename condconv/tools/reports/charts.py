"""Line and bar charts as SVG: text stays text, colours follow the page, nothing is loaded.

Lengths are in units of the drawing, which is 400 wide, about as many pixels as a phone.
"""

import base64
import dataclasses
import html
import itertools
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from condconv.tools.reports.records import Points

_WIDTH, _LEFT, _RIGHT, _TOP, _HEIGHT = 400, 50, 382, 46, 200
_BOTTOM = _TOP + _HEIGHT
_LEGEND, _LINE = _BOTTOM + 50, 17
_CHARACTERS = 42  # that fit into a line of the drawing in any usual font
_MOST_POINTS, _MOST_MARKERS = 1200, 10  # of a chart, of a line

# Okabe and Ito's colours, which people of every colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("none", "6 3", "2 3", "8 3 2 3")
_MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3 -3h6v6h-6z",
    "M0 -4L4 3H-4z",
    "M0 -4.5L4.5 0L0 4.5L-4.5 0z",
    "M0 4L4 -3H-4z",
    "M-1 -4h2v3h3v2h-3v3h-2v-3h-3v-2h3z",
)

STYLE = "\n".join(
    [
        "svg { font: 12px system-ui, sans-serif; }",
        "svg text { fill: currentColor; }",
        "svg .title { font-weight: 600; font-size: 13px; }",
        "svg .grid { stroke: currentColor; stroke-opacity: 0.15; }",
        "svg .axis { stroke: currentColor; stroke-opacity: 0.6; fill: none; }",
        "svg .line { stroke: currentColor; stroke-width: 1.6; fill: none;"
        " stroke-linejoin: round; stroke-linecap: round; }",
        "svg .area { fill: currentColor; }",
        "svg .hollow { fill: none; stroke: currentColor; stroke-width: 1.6; }",
        *(f"svg .c{i} {{ color: {colour}; }}" for i, colour in enumerate(COLOURS)),
        *(f"svg .d{i} {{ stroke-dasharray: {dash}; }}" for i, dash in enumerate(_DASHES)),
    ]
)
"""CSS of the charts: of a page that holds them, and inside each that stands alone."""


@dataclasses.dataclass(frozen=True)
class Look:
    """How a series looks: each part tells it apart by itself.

    Attributes:
        colour: index into ``COLOURS``; None for the colour of text.
        dash: index of a pattern of the line; None for no line.
        marker: index of a shape; None for no marker.
        hollow: whether markers are outlines.
    """

    colour: int | None = None
    dash: int | None = 0
    marker: int | None = None
    hollow: bool = False

    @classmethod
    def number(cls, index: int, dash: int | None = 0) -> "Look":
        """Returns the look of the series of that number; 36 of them differ."""
        count = len(COLOURS)
        return cls(index % count, dash, (index + index // count) % len(_MARKERS))


@dataclasses.dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        points: (x, y); a y of None breaks the line.
        look: of them.
        intervals: (low, high) around each y, or nothing.
    """

    points: Points
    look: Look
    intervals: Sequence[tuple[float, float] | None] = ()


@dataclasses.dataclass(frozen=True)
class Chart:
    """What to draw.

    Attributes:
        title, x, y: text above the drawing and at its axes.
        series: lines and markers.
        legend: text and look of each entry.
        bounds: lowest and highest y; None to follow the points.
        log, log_x: whether y or x is logarithmic where it spans much.
        columns: stacked bars instead of series: their colours, and for each the heights of all
            its columns from left to right.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series] = ()
    legend: Sequence[tuple[str, Look]] = ()
    bounds: tuple[float, float] | None = None
    log: bool = False
    log_x: bool = False
    columns: Sequence[tuple[int | None, Sequence[float]]] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self.columns and not any(y is not None for s in self.series for _, y in s.points)


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Turns values between ``low`` and ``high`` into places between ``begin`` and ``end``."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        transform: Callable[[float], float] = math.log10 if self.log else float
        low, high = transform(self.low), transform(self.high)
        share = (transform(min(max(value, self.low), self.high)) - low) / (high - low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Returns round values between ``low`` and ``high``."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = self._step()
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * i for i in range(first, last + 1)]

    def rounded(self) -> "_Scale":
        """Returns a scale that begins and ends at a tick."""
        step = self._step()
        low, high = math.floor(self.low / step + 1e-9), math.ceil(self.high / step - 1e-9)
        return dataclasses.replace(self, low=step * low, high=step * high)

    def _step(self) -> float:
        return _round_up((self.high - self.low) / 6)


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 2, 5, 10, 20) if n * power >= value * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil((last - first) / 7)
    multiples = (1, 2, 5) if last - first <= 3 else (1,)
    values = [n * 10.0**power for power in range(first, last + 1, every) for n in multiples]
    return [value for value in values if low <= value <= high]


def draw(chart: Chart, standalone: bool = False) -> str:
    """Returns the chart as an SVG element, or as a file with its style inside."""
    height = _LEGEND + _LINE * len(chart.legend) - (8 if chart.legend else 12)
    style = f"<style>{STYLE} svg {{ background: #fff; color: #222; }}</style>" * standalone
    size = f' width="{2 * _WIDTH}" height="{2 * height}"' * standalone
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"{size} '
        f'role="img" aria-label="{escape(chart.title)}">{style}{"".join(_parts(chart))}</svg>'
    )


def link(chart: Chart) -> str:
    """Returns the address under which a page holds the chart as a file."""
    content = base64.b64encode(draw(chart, standalone=True).encode()).decode()
    return f"data:image/svg+xml;base64,{content}"


def escape(value: object) -> str:
    """Returns text that HTML and XML show as it is, whatever it holds."""
    text = str(value).encode("utf-8", "replace").decode()
    visible = ("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
    return html.escape("".join(visible))


def _parts(chart: Chart) -> Iterator[str]:
    most = max(50, _MOST_POINTS // (len(chart.series) or 1))
    drawn = [dataclasses.replace(each, points=_thin(each.points, most)) for each in chart.series]
    across, up = _scales(chart)
    yield _text(4, 16, chart.title, "title")
    yield _text(4, 34, chart.y)
    yield from _axes(across, up)
    yield _text((_LEFT + _RIGHT) / 2, _BOTTOM + 34, chart.x, anchor="middle")
    yield from _columns(chart.columns, across, up)
    for series in drawn:
        yield from _series(series, across, up)
    for row, (name, look) in enumerate(chart.legend):
        yield from _entry(_LEGEND + _LINE * row, name, look)


def _scales(chart: Chart) -> tuple[_Scale, _Scale]:
    points = [(x, y) for s in chart.series for x, y in s.points if y is not None]
    ys = [y for _, y in points]
    ys += [bound for s in chart.series for pair in s.intervals if pair for bound in pair]
    xs = [x for x, _ in points]
    if chart.columns:
        heights = [sum(column) for column in zip(*(h for _, h in chart.columns), strict=True)]
        xs, ys = [0.5, len(heights) + 0.5], [0, *heights]
    across = _scale(xs, (_LEFT, _RIGHT), chart.log_x)
    up = _scale(ys, (_BOTTOM, _TOP), chart.log)
    if chart.bounds:
        low, high = chart.bounds
        return across, dataclasses.replace(up, low=low, high=high, log=False)
    return across, up if up.log else up.rounded()


def _scale(values: Sequence[float], ends: tuple[float, float], may_be_log: bool) -> _Scale:
    if may_be_log and values and 0 < 6 * min(values) < max(values):
        return _Scale(min(values) / 1.2, max(values) * 1.2, *ends, log=True)
    return _Scale(*_limits(values), *ends)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Returns limits around some values; 0 is one of them unless they are far from it."""
    if not values:
        return 0, 1
    low, high = min(values), max(values)
    if 0 < low < 0.7 * high:
        low = 0
    if low == high:
        return low - (abs(low) or 1), high + (abs(high) or 1)
    return low, high


def _axes(across: _Scale, up: _Scale) -> Iterator[str]:
    for value, label in _labelled(up.ticks()):
        place = up(value)
        yield f'<path class="grid" d="M{_LEFT} {place:.1f}H{_RIGHT}"/>'
        yield _text(_LEFT - 6, place + 4, label, anchor="end")
    for value, label in _labelled(across.ticks()):
        place = across(value)
        yield f'<path class="axis" d="M{place:.1f} {_BOTTOM}v4"/>'
        yield _text(place, _BOTTOM + 17, label, anchor="middle")
    yield f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>'


def _labelled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    largest = max(map(abs, ticks), default=0)
    units = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    unit, sign = next(((u, s) for least, u, s in units if least <= largest < 1e15), (1, ""))
    return [(tick, f"{tick / unit:.4g}{sign if tick else ''}") for tick in ticks]


def _columns(
    columns: Sequence[tuple[int | None, Sequence[float]]], across: _Scale, up: _Scale
) -> Iterator[str]:
    below = [0.0] * max((len(heights) for _, heights in columns), default=0)
    for colour, heights in columns:
        parts = []
        for number, height in enumerate(heights, start=1):
            left, right = across(number - 0.4), across(number + 0.4)
            begin, end = up(below[number - 1]), up(below[number - 1] + height)
            below[number - 1] += height
            if begin - end > 0.05:
                parts.append(f"M{left:.1f} {begin:.1f}V{end:.1f}H{right:.1f}V{begin:.1f}z")
        if parts:
            yield f'<path class="mark area{_colour(colour)}" d="{"".join(parts)}"/>'


def _series(series: Series, across: _Scale, up: _Scale) -> Iterator[str]:
    look, places = (
        series.look,
        [(across(x), None if y is None else up(y)) for x, y in series.points],
    )
    if look.dash is not None:
        runs = itertools.groupby(places, key=lambda place: place[1] is not None)
        joined = ["L".join(f"{x:.1f} {y:.1f}" for x, y in run) for drawn, run in runs if drawn]
        path = "".join(f"M{each}h0" for each in joined)  # so that a lonely point is a dot
        yield f'<path class="mark line d{look.dash}{_colour(look.colour)}" d="{path}"/>' * bool(
            path
        )
    for (x, _), interval in zip(places, series.intervals, strict=False):
        if interval:
            low, high = map(up, interval)
            whisker = f"M{x - 3:.1f} {low:.1f}h6m-3 0V{high:.1f}m-3 0h6"
            yield f'<path class="mark line{_colour(look.colour)}" d="{whisker}"/>'
    drawn = [(x, y) for x, y in places if y is not None]
    every = 1 if look.dash is None else math.ceil(len(drawn) / _MOST_MARKERS) or 1
    for x, y in drawn[::-1][::every]:
        yield _marker(x, y, look)


def _marker(x: float, y: float, look: Look) -> str:
    if look.marker is None:
        return ""
    kind = "hollow" if look.hollow else "area"
    at = f'transform="translate({x:.1f} {y:.1f})"'
    return f'<path class="mark {kind}{_colour(look.colour)}" {at} d="{_MARKERS[look.marker]}"/>'


def _entry(y: float, name: str, look: Look) -> Iterator[str]:
    if look.dash is not None:
        yield f'<path class="line d{look.dash}{_colour(look.colour)}" d="M{_LEFT} {y}h28"/>'
    yield _marker(_LEFT + 14, y, look)
    yield _text(_LEFT + 36, y + 4, name)


def _colour(index: int | None) -> str:
    return "" if index is None else f" c{index}"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(_cut(text))}</text>'


def _cut(text: str) -> str:
    """Returns as much of a text as fits into a line; wide characters count as two."""
    widths = itertools.accumulate(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    fitting = sum(width <= _CHARACTERS for width in widths)
    return text if fitting == len(text) else f"{text[: fitting - 1]}…"


def _thin(points: Points, most: int) -> Points:
    """Returns a curve of about ``most`` points: of each part its extremes and its breaks."""
    size = math.ceil(2 * len(points) / most)
    if size <= 2:
        return points
    parts = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [points[0], *(point for part in parts for point in _extremes(part)), points[-1]]


def _extremes(part: Points) -> Points:
    drawn = [i for i, (_, y) in enumerate(part) if y is not None]
    broken = [i for i, (_, y) in enumerate(part) if y is None][:1]
    ends = [extreme(drawn, key=lambda i: part[i][1]) for extreme in (min, max) if drawn]
    return [part[i] for i in sorted({*ends, *broken})]
