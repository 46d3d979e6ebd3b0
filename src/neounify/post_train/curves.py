"""Curves as inline SVG: lines over steps, with linear or logarithmic axis and a legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
"""(x, y) pairs in the order of x; y finite."""

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 26
"""Margins of the plotted area."""
COLOURS = (
    *("#1f6fb4", "#d9662b", "#2e8b57", "#b8336a", "#7d5ba6"),
    *("#8a6d3b", "#2a9fa8", "#6b7280", "#a3a516", "#111827"),
)
DASHES = ("", "6 3", "2 3")
SMOOTHED_FROM = 25
"""Points from which on a line is drawn as its running mean over the faint values."""
MEMORY = 0.85
"""Share of a running mean that a point leaves as it was."""
MAX_POINTS = 400
"""Points drawn of a line; longer ones are thinned to means of neighbours."""


def chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    logarithmic: bool = False,
    smooth: bool = True,
    across: tuple[float, float] | None = None,
    borders: Sequence[float] = (),
) -> str:
    """A figure with one curve per name; values of 0 and below are left out of a logarithmic axis.

    `across` is the range of x, by default that of the points; `borders` are marked, and no running
    mean crosses them. Every name is escaped. The legend has first and last value of what is drawn.
    """
    shown = {
        name: thinned([(x, y) for x, y in points if y > 0 or not logarithmic])
        for name, points in lines.items()
    }
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    axes = _Axes(list(shown.values()), logarithmic, across)
    parts, legend = [axes.svg(borders)], []
    for number, (name, points) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        dashes = DASHES[number // len(COLOURS) % len(DASHES)]
        style = f'stroke="{colour}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
        line = points
        if smooth and len(points) >= SMOOTHED_FROM:
            line = running_mean(points, logarithmic, borders)
            parts.append(f'<path class="faint" {style} d="{axes.path(points)}"/>')
        label = f"{name}: {number_text(line[0][1])} to {number_text(line[-1][1])}"
        parts.append(f'<path {style} d="{axes.path(line)}"><title>{escape(label)}</title></path>')
        if len(points) == 1:
            x, y = axes.place(points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        legend.append(f'<li><i style="background:{colour}"></i>{escape(label)}</li>')
    kind = ", logarithmic" if logarithmic else ""
    return (
        f"<figure><figcaption>{escape(title)}{kind}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg><ul>{''.join(legend)}</ul></figure>"
    )


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of a run of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return list(points)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def running_mean(
    points: Points, logarithmic: bool = False, borders: Sequence[float] = ()
) -> list[tuple[float, float]]:
    """The exponential mean of the values so far, of their logarithms on a logarithmic axis.

    Its weights are those of the points seen since the last of `borders`, so that it begins at the
    first value.
    """
    mean, weight, means, left = 0.0, 0.0, [], sorted(borders)
    for x, y in points:
        while left and x > left[0]:
            mean, weight = 0.0, 0.0
            del left[0]
        value = math.log(y) if logarithmic else y
        mean, weight = MEMORY * mean + (1 - MEMORY) * value, MEMORY * weight + 1 - MEMORY
        means.append((x, math.exp(mean / weight) if logarithmic else mean / weight))
    return means


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def number_text(value: float) -> str:
    """A short form of a number: four digits, an exponent outside 0.001 to 100,000."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


class _Axes:
    """The plotted area of some lines: places of points, grid and labels."""

    def __init__(
        self,
        lines: Sequence[Points],
        logarithmic: bool,
        across: tuple[float, float] | None,
    ) -> None:
        xs = [x for points in lines for x, _ in points]
        ys = [self._value(y, logarithmic) for points in lines for _, y in points]
        self.logarithmic = logarithmic
        self.x0, self.x1 = _widened(*(across or (min(xs), max(xs))), 0.0)
        self.y0, self.y1 = _widened(min(ys), max(ys), 0.05)

    @staticmethod
    def _value(y: float, logarithmic: bool) -> float:
        return math.log10(y) if logarithmic else y

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        """Where a point stands in the image."""
        return self._across(point[0]), self._down(self._value(point[1], self.logarithmic))

    def _across(self, x: float) -> float:
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def _down(self, value: float) -> float:
        return TOP + (self.y1 - value) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        """The line through some points."""
        places = [self.place(point) for point in points]
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)

    def svg(self, borders: Sequence[float]) -> str:
        """Grid lines with their values, and marks of borders."""
        parts = []
        for value in self._rows():
            y = self._down(value)
            text = number_text(10.0**value if self.logarithmic else value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        for value in ticks(self.x0, self.x1, 5):
            x = self._across(value)
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - 9}" text-anchor="middle">{value:,.4g}</text>'
            )
        for value in borders:
            x = self._across(value)
            parts.append(f'<path class="border" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        return "".join(parts)

    def _rows(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.y0, self.y1)
        whole = range(math.ceil(self.y0), math.floor(self.y1) + 1)
        if len(whole) > 2:
            return [float(value) for value in whole[:: math.ceil(len(whole) / 6)]]
        decades = range(math.floor(self.y0), math.floor(self.y1) + 1)
        between = [d + math.log10(m) for d in decades for m in (1, 2, 5)]
        rows = [value for value in between if self.y0 <= value <= self.y1]
        return rows if len(rows) > 1 else [math.log10(y) for y in self._round() if y > 0]

    def _round(self) -> list[float]:
        return ticks(10**self.y0, 10**self.y1)


def _widened(low: float, high: float, margin: float) -> tuple[float, float]:
    """A range with a margin on both sides, never empty."""
    if low == high:
        return (low, low + 1) if not low else (low - abs(low) / 10, low + abs(low) / 10)
    more = (high - low) * margin
    return low - more, high + more
