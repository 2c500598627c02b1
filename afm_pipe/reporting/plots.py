"""Heat maps, error bars, and the axes and styles of all drawings, as SVG.

Colors are CSS variables, so that one drawing works in light mode, dark mode and print. The aria-label of a drawing has
its numbers. The same input gives the same bytes.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from afm_pipe.reporting.titles import number

LIGHT = ("#1f6fb5", "#c4511a", "#2b8a3e", "#8b46b5", "#9a7200", "#0c7f81", "#c2255c", "#555b63")
DARK = ("#6cb2f0", "#f4915b", "#69c77b", "#c792ea", "#e0b84c", "#4fd1c5", "#f783ac", "#b4bbc4")
CELL_WIDTH, CELL_HEIGHT = 92, 40
STRONGEST = 0.62  # opacity of the best cell: its text stays readable in light and dark mode
WIDTH, HEIGHT = 560, 250  # of error bars
READABLE = 352  # pixels: a wider drawing scrolls on a narrow screen rather than shrink further
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 30, 44
LETTER = 6.4  # width of a letter of 11 px text
TITLE_LETTER = 7.6  # of a title
LINE = 13  # height of a line of a label


def stylesheet() -> str:
    """Return the CSS of all drawings: colors for light and dark, and classes."""
    light, dark = (";".join(f"--run-{i}:{color}" for i, color in enumerate(colors)) for colors in (LIGHT, DARK))
    return (
        f":root{{{light};--surface:#fff;--ink:#1c2127;--muted:#59636e;--rule:#dfe3e8}}\n"
        "@media screen and (prefers-color-scheme: dark)"
        f"{{:root{{{dark};--surface:#171b20;--ink:#e7eaee;--muted:#a0abb7;--rule:#323a43}}}}\n"
        """svg text{font:11px system-ui,sans-serif;fill:var(--muted)}
svg text.title{font-weight:600;font-size:12px;fill:var(--ink)}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .line{fill:none;stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}
svg .mark{fill:none;stroke-width:2;stroke-dasharray:none}
svg .mark.intervention{fill:var(--surface)}
svg .cell{fill:var(--run-0);stroke:var(--surface);stroke-width:2}
svg .cell.none{fill:var(--rule);fill-opacity:.45}
svg .cell.best{stroke:var(--ink)}
svg text.value{fill:var(--ink);font-size:12px;font-variant-numeric:tabular-nums}
svg .bar{stroke:var(--run-0);stroke-width:2;fill:none}
svg .dot{fill:var(--run-0)}
svg .dot.hollow{fill:var(--surface);stroke:var(--run-0);stroke-width:2}"""
    )


class Axis(NamedTuple):
    """A linear or logarithmic axis."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: ArrayLike, log: bool = False, trim: float = 0.0) -> "Axis":
        """Return an axis around the finite values, without `trim` percent of them on either side, with a margin.

        Without any positive value, it is linear.
        """
        found = np.asarray(values, dtype=float)
        found = found[np.isfinite(found)]
        log = log and bool((found > 0).any())
        if log:
            found = found[found > 0]
        if not found.size:
            return cls(0.0, 1.0)
        low, high = map(float, np.percentile(found, (trim, 100 - trim)))
        if log:
            return cls(low / 1.3, high * 1.3, True)
        pad = 0.07 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(0.0 if 0 <= low <= 0.4 * high else low - pad, high + pad)

    def place(self, values: ArrayLike) -> np.ndarray:
        """Return places along the axis, from 0 to 1 between its ends; nan for values that have none."""
        found = np.asarray(values, dtype=float)
        if not self.log:
            return (found - self.low) / (self.high - self.low)
        return np.log(np.where(found > 0, found, math.nan) / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Return a few round numbers along the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5)):
                ticks = [factor * 10.0**power for power in powers for factor in factors]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) >= 2:
                    return ticks[:: math.ceil(len(ticks) / 5)]
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(span / 3))
        step *= max(factor for factor in (1, 2, 5, 10) if factor == 1 or span / (step * factor) >= 2.5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def rules(self, left: float, right: float, top: float, height: float) -> str:
        """Draw the axis upwards: a rule and a number at every tick."""
        return "".join(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            + text(left - 6, y + 4, short(tick), "end")
            for tick in self.ticks()
            for y in (top + (1 - float(self.place(tick))) * height,)
        )


class Point(NamedTuple):
    """A mean and the ends of its interval; without ends it is drawn hollow. `x` is a number or a label."""

    x: float | str
    mean: float | None
    low: float | None = None
    high: float | None = None
    series: int = 0


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    title: str,
    row_title: str = "",
    column_title: str = "",
) -> str:
    """Draw a grid of values of which lower is better: the lower, the more opaque; the lowest is framed, None is pale.

    `texts` stand in the cells and have the shape of `values`. Opacity is logarithmic if all values are positive.
    """
    left = max(70.0, LETTER * max(map(len, (*rows, row_title))) + 16)
    heads = [_wrap(name, CELL_WIDTH) for name in columns]
    top = (62 if column_title else 46) + LINE * (max(map(len, heads)) - 1)
    width = max(left + CELL_WIDTH * len(columns), TITLE_LETTER * len(title) + 8) + 8
    found = [value for line in values for value in line if value is not None and math.isfinite(value)]
    best = min(found, default=None)
    scale = Axis(min(found), max(found), min(found) > 0) if found else Axis(0, 1)
    parts = [
        text(8, 16, title, kind="title"),
        text(left + CELL_WIDTH * len(columns) / 2, 38, column_title, "middle") if column_title else "",
        text(left - 8, top - 8, row_title, "end") if row_title else "",
        *(
            _label(left + CELL_WIDTH * (index + 0.5), top - 8 - LINE * (len(lines) - 1), lines)
            for index, lines in enumerate(heads)
        ),
    ]
    for line, name in enumerate(rows):
        y = top + CELL_HEIGHT * line
        parts.append(text(left - 8, y + CELL_HEIGHT / 2 + 4, name, "end"))
        for index, (value, words) in enumerate(zip(values[line], texts[line], strict=True)):
            x, kind, fill = left + CELL_WIDTH * index, "cell none", ""
            if value is not None and math.isfinite(value):
                share = float(scale.place(value)) if scale.high > scale.low else 0.0
                fill = f' fill-opacity="{0.06 + (STRONGEST - 0.06) * (1 - share):.3f}"'
                kind = "cell best" if value == best else "cell"
            parts.append(
                f'<rect class="{kind}" x="{x + 1:.1f}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}"'
                f' rx="4"{fill}/>' + text(x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2 + 4, words, "middle", "value")
            )
    words = "; ".join(
        f"{row}: " + ", ".join(f"{cell} at {column}" for column, cell in zip(columns, line, strict=True))
        for row, line in zip(rows, texts, strict=True)
    )
    height = top + CELL_HEIGHT * len(rows) + 8
    return svg(width, height, f"{title}. Lower is better. {words}", parts, _sized(width))


def error_bars(
    points: Sequence[Point], title: str, x_title: str = "", log_x: bool = False, legend: Sequence[str] = ()
) -> str:
    """Draw means with their intervals, of which lower is better, over numbers, or side by side when any `x` is a label.

    A point without a mean appears only in the description; one without an interval is hollow. A logarithmic x axis has
    0 at its left end; the y axis is logarithmic if all values are positive. Several series have a color each, and
    `legend` names them.
    """
    drawn = [point for point in points if point.mean is not None and math.isfinite(point.mean)]
    ends = [end for p in drawn for end in (p.mean, p.low, p.high) if end is not None]
    axis = Axis.around(ends, all(end > 0 for end in ends))
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    places, names = _places(points, log_x)
    room = inner_width / len(points) if any(isinstance(point.x, str) for point in points) else inner_width
    labels = [(LEFT + place * inner_width, _wrap(name, room)) for place, name in names]
    height = HEIGHT + LINE * (max((len(lines) for _, lines in labels), default=1) - 1)

    def up(value: float) -> float:
        return TOP + (1 - float(axis.place(value))) * inner_height

    parts = [
        text(LEFT, 16, title, kind="title"),
        axis.rules(LEFT, WIDTH - RIGHT, TOP, inner_height),
        *(_label(x, HEIGHT - BOTTOM + 16, lines) for x, lines in labels),
        text(WIDTH - RIGHT, height - 8, x_title, "end") if x_title else "",
    ]
    for point, place in zip(points, places, strict=True):
        if point not in drawn or point.mean is None:
            continue
        x, y, kind = LEFT + place * inner_width, up(point.mean), "dot hollow"
        color = f"var(--run-{point.series % len(LIGHT)})"
        if point.low is not None and point.high is not None:
            a, b, kind = up(point.low), up(point.high), "dot"
            path = f"M{x:.1f} {a:.1f}V{b:.1f}M{x - 5:.1f} {a:.1f}h10M{x - 5:.1f} {b:.1f}h10"
            parts.append(f'<path class="bar" style="stroke:{color}" d="{path}"/>')
        style = f"{'fill' if kind == 'dot' else 'stroke'}:{color}"
        parts.append(
            f'<circle class="{kind}" style="{style}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
            f"<title>{escape(_words(point, legend))}</title></circle>"
        )
    for series, name in enumerate(legend):
        y = height + LINE * (series + 1)
        parts.append(f'<circle style="fill:var(--run-{series % len(LIGHT)})" cx="{LEFT + 5}" cy="{y - 4}" r="4.5"/>')
        parts.append(text(LEFT + 16, y, name))
    height += (LINE * len(legend) + 8) * bool(legend)
    words = "; ".join(_words(point, legend) for point in points)
    return svg(WIDTH, height, f"{title}. Lower is better. {words}", parts, _sized(WIDTH))


def _sized(width: float) -> str:
    """Return the style of a drawing that is never larger than drawn, and never too small to read."""
    return f"max-width:{width:.0f}px;min-width:{min(width, READABLE):.0f}px"


def svg(width: float, height: float, label: str, parts: Iterable[str], style: str = "") -> str:
    """Wrap the parts of a drawing; `label` describes it to screen readers."""
    styled = f' style="{style}"' if style else ""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img"{styled} aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def text(x: float, y: float, words: str, anchor: str = "", kind: str = "") -> str:
    """Write words at a place; `anchor` is start, middle or end, `kind` a CSS class."""
    attributes = f' text-anchor="{anchor}"' * bool(anchor) + f' class="{kind}"' * bool(kind)
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(words)}</text>'


def short(value: float) -> str:
    """Print a tick: 20k, 0.05, 1e-5."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}".replace("e-0", "e-")


def _places(points: Sequence[Point], log_x: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the points' places along the x axis (0 to 1), and the axis's labels with their places."""
    if any(isinstance(point.x, str) for point in points):
        places = [(index + 0.5) / len(points) for index in range(len(points))]
        return places, [(place, _name(point.x)) for place, point in zip(places, points, strict=True)]
    numbers = [float(point.x) for point in points]
    positive = [x for x in numbers if x > 0]
    log_x = log_x and bool(positive)
    if log_x:
        least = min(positive) / (3 if len(positive) < len(numbers) else 1)  # a place for 0
        numbers = [max(x, least) for x in numbers]
    axis = Axis(min(numbers), max(numbers), log_x)
    shares = [0.5] * len(points) if axis.low == axis.high else map(float, axis.place(numbers))
    places = [0.05 + 0.9 * share for share in shares]
    labels: list[tuple[float, str]] = []
    for place, point in sorted(zip(places, points, strict=True), key=lambda pair: pair[0]):
        name = _name(point.x)
        if not labels or (place - labels[-1][0]) * (WIDTH - LEFT - RIGHT) > LETTER * (len(name) + len(labels[-1][1])):
            labels.append((place, name))
    return places, labels


def _wrap(name: str, room: float) -> list[str]:
    """Break a label into lines of at most `room` pixels."""
    return textwrap.wrap(name, max(int(room / LETTER), 4)) or [""]


def _label(x: float, y: float, lines: Sequence[str]) -> str:
    return "".join(text(x, y + LINE * index, line, "middle") for index, line in enumerate(lines))


def _name(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:g}"


def _words(point: Point, names: Sequence[str] = ()) -> str:
    interval = f" [{number(point.low)}, {number(point.high)}]" if point.low is not None else ""
    series = f"{names[point.series]}, " if names else ""
    return f"{series}{_name(point.x)}: {number(point.mean)}{interval}"
