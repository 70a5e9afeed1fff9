"""Small charts as inline SVG: bars, scatter, lines. They follow the colours of ``gramian.report.page``, light or dark.

Each function returns a ``<figure>``. Values that are not finite (or not positive, on a logarithmic axis) are left out;
a figure that leaves points out says how many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from gramian.report.page import Html, chip, escape, finite, number, shorten

COLOURS = tuple(f"var(--c{index})" for index in range(7))
"""Colours for series, in the order to use them; told apart by readers who do not see red and green."""
GREY = "var(--c7)"
"""Colour of what was left as it was."""


class Part(NamedTuple):
    """A stretch of a bar."""

    value: float
    colour: str
    label: str


class Bar(NamedTuple):
    """A row of a bar chart: its parts end to end, over a track of length `total`; `text` is written at the right."""

    label: str
    parts: Sequence[Part]
    text: str
    total: float | None = None


class Point(NamedTuple):
    """A point of a scatter chart; `label` is its tooltip."""

    x: float | None
    y: float | None
    label: str
    colour: str = COLOURS[0]


class Series(NamedTuple):
    """A curve."""

    name: str
    points: Sequence[tuple[float | None, float | None]]
    colour: str


def bars(rows: Sequence[Bar], *, title: str, subtitle: str = "", legend: Mapping[str, str] | None = None) -> Html:
    """Horizontal bars on a common scale from 0.

    Args:
        rows: from top to bottom.
        title: heading of the figure.
        subtitle: a line under it.
        legend: name of a series -> its colour.
    """
    longest = max((max(_sum(row), row.total or 0.0 if finite(row.total) else 0.0) for row in rows), default=0.0)
    left = min(200.0, 14 + 6.5 * max((len(shorten(row.label, 30)) for row in rows), default=0))
    right = 14 + 6.8 * max((len(row.text) for row in rows), default=0)
    scale = (_WIDTH - left - right) / longest if longest > 0 else 0.0
    step, thick = 22.0, 13.0
    body = []
    for index, row in enumerate(rows):
        top = index * step + (step - thick) / 2
        middle = index * step + step / 2 + 4
        body.append(f"<g><title>{escape(shorten(row.label))}: {escape(row.text)}</title>")
        body.append(f'<text class="label" x="{left - 8:.0f}" y="{middle:.1f}" text-anchor="end">')
        body.append(f"{escape(shorten(row.label, 30))}</text>")
        if finite(row.total):
            body.append(_rectangle(left, top, row.total * scale, thick, "var(--track)"))
        start = left
        for part in row.parts:
            if finite(part.value) and part.value > 0:
                width = part.value * scale
                body.append(_rectangle(start, top, width, thick, part.colour, f"{shorten(row.label)}: {part.label}"))
                start += width
        body.append(f'<text x="{_WIDTH}" y="{middle:.1f}" text-anchor="end">{escape(row.text)}</text></g>')
    return _figure(title, subtitle, legend or {}, "".join(body), _WIDTH, max(step, len(rows) * step), bool(rows))


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_title: str,
    y_title: str,
    subtitle: str = "",
    legend: Mapping[str, str] | None = None,
) -> Html:
    """Points on two logarithmic axes of the same range, with the diagonal on which the two values are equal."""
    shown = [(p.x, p.y, p) for p in points if finite(p.x) and finite(p.y) and p.x > 0 and p.y > 0]
    if len(shown) < len(points):
        subtitle = f"{subtitle} {len(points) - len(shown)} not shown (zero, missing or not finite).".strip()
    values = [value for x, y, _ in shown for value in (x, y)]
    low, high = (min(values) / 1.25, max(values) * 1.25) if values else (0.1, 1.0)
    if high / low < 10:  # a range of less than a decade would magnify noise
        centre = math.sqrt(low) * math.sqrt(high)
        low, high = centre / math.sqrt(10), centre * math.sqrt(10)
    frame = _Frame((low, high), (low, high), _WIDTH, 340.0, log_x=True, log_y=True)
    body = [frame.axes(x_title, y_title)]
    body.append(f'<path class="mark" d="M{frame.at(low, low)}L{frame.at(high, high)}"/>')
    for x, y, point in shown:
        place = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4" style="fill:{escape(point.colour)}"'
        body.append(
            f'<circle class="point" {place}>'
            f"<title>{escape(shorten(point.label))}: {number(x)}, {number(y)}</title></circle>"
        )
    return _figure(title, subtitle, legend or {}, "".join(body), frame.width, frame.height, bool(shown))


def lines(
    series: Sequence[Series],
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "",
    y_title: str = "",
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    mark: float | None = None,
    small: bool = False,
) -> Html:
    """Curves over a common axis.

    Args:
        series: curves; a legend is drawn unless `small` or alone.
        title: heading of the figure.
        subtitle: a line under it.
        x_title: what the horizontal axis shows.
        y_title: what the vertical axis shows.
        log_y: a logarithmic vertical axis.
        y_range: lowest and highest value of the vertical axis; by default those of the curves.
        mark: where to draw a vertical line.
        small: for small multiples, without axis titles and legend.
    """
    curves = [(s, [(x, y) for x, y in s.points if finite(x) and finite(y) and (y > 0 or not log_y)]) for s in series]
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    vertical = y_range or _padded(ys, log_y)
    horizontal = (min(xs), max(xs)) if xs and min(xs) < max(xs) else _padded(xs, log=False)
    width, height = (200.0, 112.0) if small else (_WIDTH, 270.0)
    frame = _Frame(horizontal, vertical, width, height, log_y=log_y, small=small)
    body = [frame.axes(x_title, y_title)]
    if finite(mark) and horizontal[0] <= mark <= horizontal[1]:
        body.append(f'<path class="mark" d="M{frame.at(mark, vertical[0])}L{frame.at(mark, vertical[1])}"/>')
    for curve, points in curves:
        path = "L".join(frame.at(x, min(max(y, vertical[0]), vertical[1])) for x, y in points)
        if path:
            # A lone point would be invisible as a path of no length: round caps draw it as a dot.
            path = path if "L" in path else f"{path}L{path}"
            body.append(f'<path class="curve" style="stroke:{escape(curve.colour)}" d="M{path}"/>')
    legend = {curve.name: curve.colour for curve in series} if len(series) > 1 and not small else {}
    return _figure(title, subtitle, legend, "".join(body), width, height, bool(xs))


_WIDTH = 500.0


class _Frame:
    """The plot area: from values to coordinates, and the axes around it."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        width: float,
        height: float,
        *,
        log_x: bool = False,
        log_y: bool = False,
        small: bool = False,
    ) -> None:
        self.width, self.height, self.small, self.log_x = width, height, small, log_x
        most = (4, 3) if small else (6, 6)
        self.x_ticks = _ticks(*x_range, most[0], log_x)
        self.y_ticks = _ticks(*y_range, most[1], log_y)
        widest = max((len(label) for _, label in self.y_ticks), default=1)
        self.left = 8 + (6.2 if small else 7.0) * widest + (0 if small else 18)
        self.right = width - (10 if small else 14)
        self.top, self.bottom = 7.0, height - (18 if small else 40)
        self.x = _scale(x_range, (self.left, self.right), log_x)
        self.y = _scale(y_range, (self.bottom, self.top), log_y)

    def at(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f},{self.y(y):.1f}"

    def axes(self, x_title: str, y_title: str) -> str:
        parts = []
        for value, label in self.y_ticks:
            height = self.y(value)
            parts.append(f'<path class="rule" d="M{self.left:.1f},{height:.1f}H{self.right:.1f}"/>')
            parts.append(f'<text x="{self.left - 6:.1f}" y="{height + 4:.1f}" text-anchor="end">{label}</text>')
        for value, label in self.x_ticks:
            along = self.x(value)
            if self.log_x:
                parts.append(f'<path class="rule" d="M{along:.1f},{self.top:.1f}V{self.bottom:.1f}"/>')
            parts.append(f'<path class="axis" d="M{along:.1f},{self.bottom:.1f}v4"/>')
            parts.append(f'<text x="{along:.1f}" y="{self.bottom + 16:.1f}" text-anchor="middle">{label}</text>')
        parts.append(f'<path class="axis" d="M{self.left:.1f},{self.bottom:.1f}H{self.right:.1f}"/>')
        if not self.small:
            across, down = (self.left + self.right) / 2, (self.top + self.bottom) / 2
            parts.append(f'<text x="{across:.1f}" y="{self.height - 4:.1f}" text-anchor="middle">')
            parts.append(f'{escape(x_title)}</text><text transform="translate(11,{down:.1f}) rotate(-90)" ')
            parts.append(f'text-anchor="middle">{escape(y_title)}</text>')
        return "".join(parts)


def _scale(values: tuple[float, float], places: tuple[float, float], log: bool) -> Callable[[float], float]:
    transform: Callable[[float], float] = math.log if log else float
    low, high = (transform(value) for value in values)
    return lambda value: places[0] + (transform(value) - low) / (high - low) * (places[1] - places[0])


def _ticks(low: float, high: float, most: int, log: bool) -> list[tuple[float, str]]:
    """At most about `most` round values from `low` to `high`, with their texts."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        stride = max(1, math.ceil((len(decades) - 2) / most))  # both ends may lie outside
        span = math.log10(high) - math.log10(low)
        factors = (1, 2, 5) if span <= 2 else (1, 3) if span <= 3 else (1,)
        ticks = [(v, number(v, 1)) for d in decades[::stride] for v in (factor * 10.0**d for factor in factors)]
        return [(value, label) for value, label in ticks if low <= value <= high]
    # Divide before subtracting: the range itself may be too large for a float.
    rough = high / most - low / most
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    plain = digits <= 5 and max(abs(low), abs(high)) < 1e7
    return [(value, f"{value:,.{digits}f}" if plain else number(value, 3)) for value in values]


def _padded(values: Sequence[float], log: bool) -> tuple[float, float]:
    """A range that holds `values` with some air, never empty."""
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    # Differences below rounding cannot be drawn.
    air = max(0.06 * (high / 2 - low / 2) * 2, 1e-6 * max(abs(low), abs(high)), 1e-300)
    # A curve that never goes below zero is not given an axis that does.
    return (max(0.0, low - air) if low >= 0 else low - air), high + air


def _sum(row: Bar) -> float:
    return sum(part.value for part in row.parts if finite(part.value) and part.value > 0)


def _rectangle(x: float, y: float, width: float, height: float, colour: str, label: str = "") -> str:
    tip = f"<title>{escape(label)}</title>" if label else ""
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:g}"'
    return f'<rect {shape} style="fill:{escape(colour)}">{tip}</rect>'


def _figure(
    title: str, subtitle: str, legend: Mapping[str, str], body: str, width: float, height: float, shown: bool
) -> Html:
    small = f"<small>{escape(subtitle)}</small>" if subtitle else ""
    keys = "".join(f"<li>{chip(name, colour)}</li>" for name, colour in legend.items())
    keys = f'<ul class="legend">{keys}</ul>' if keys else ""
    picture = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img"><title>{escape(title)}</title>{body}</svg>'
        if shown
        else '<p class="caption">Nothing to show.</p>'
    )
    return Html(f"<figure><figcaption>{escape(title)}{small}</figcaption>{keys}{picture}</figure>")
