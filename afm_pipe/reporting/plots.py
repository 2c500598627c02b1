"""Grids as heat maps and sweeps as error bars, drawn as SVG like the curves: CSS variables, text only, same bytes.

Both say their numbers in words for whoever cannot see them (aria-label).
"""

import math
import textwrap
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from afm_pipe.reporting.curves import axis_ticks, short
from afm_pipe.reporting.titles import number

CELL_WIDTH, CELL_HEIGHT = 92, 40
STRONGEST = 0.62  # opacity of the fullest cell, under which ink is readable in light and dark
WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 30, 44
LETTER = 6.4  # of 11 px text, at the widest
TITLE_LETTER = 7.6  # of a title
LINE = 13  # from one line of a long label to the next

PLOTS_CSS = """svg .cell{fill:var(--run-0);stroke:var(--surface);stroke-width:2}
svg .cell.none{fill:var(--rule);fill-opacity:.45}
svg .cell.best{stroke:var(--ink)}
svg text.value{fill:var(--ink);font-size:12px;font-variant-numeric:tabular-nums}
svg .bar{stroke:var(--run-0);stroke-width:2;fill:none}
svg .dot{fill:var(--run-0)}
svg .dot.hollow{fill:var(--surface);stroke:var(--run-0);stroke-width:2}"""


class Point(NamedTuple):
    """A mean with the ends of its interval; without ends it is drawn hollow. `x` is a place on the axis, or a label."""

    x: float | str
    mean: float | None
    low: float | None = None
    high: float | None = None


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    title: str,
    meaning: str,
    *,
    row_title: str = "",
    column_title: str = "",
    log: bool = False,
    lower_is_better: bool = True,
) -> str:
    """Draw a grid: one cell per row and column, the better the fuller, the best framed; None has a quiet cell.

    `texts` are what the cells say, in the shape of `values`; `log` spreads colours by ratio. `meaning` is said after
    the title to whoever cannot see it.
    """
    left = max(70.0, LETTER * max(map(len, (*rows, row_title))) + 16)
    heads = [_lines(name, CELL_WIDTH) for name in columns]
    top = (62 if column_title else 46) + LINE * (max(map(len, heads)) - 1)
    width = max(left + CELL_WIDTH * len(columns), TITLE_LETTER * len(title) + 8) + 8
    height = top + CELL_HEIGHT * len(rows) + 8
    found = [value for line in values for value in line if value is not None and math.isfinite(value)]
    best = (min if lower_is_better else max)(found) if found else None
    parts = [f'<text class="title" x="8" y="16">{escape(title)}</text>']
    if column_title:
        middle = left + CELL_WIDTH * len(columns) / 2
        parts.append(f'<text x="{middle:.1f}" y="38" text-anchor="middle">{escape(column_title)}</text>')
    if row_title:
        parts.append(f'<text x="{left - 8:.1f}" y="{top - 8}" text-anchor="end">{escape(row_title)}</text>')
    for index, lines in enumerate(heads):
        parts += _label(left + CELL_WIDTH * (index + 0.5), top - 8 - LINE * (len(lines) - 1), lines)
    for line, name in enumerate(rows):
        y = top + CELL_HEIGHT * line
        middle = y + CELL_HEIGHT / 2 + 4
        parts.append(f'<text x="{left - 8:.1f}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for index in range(len(columns)):
            value, x = values[line][index], left + CELL_WIDTH * index
            known = value is not None and math.isfinite(value)
            fill = f' fill-opacity="{_fullness(value, found, log, lower_is_better):.3f}"' if known else ""  # type: ignore[arg-type]
            kind = "cell none" if not known else "cell best" if value == best else "cell"
            parts.append(
                f'<rect class="{kind}" x="{x + 1:.1f}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}"'
                f' rx="4"{fill}/><text class="value" x="{x + CELL_WIDTH / 2:.1f}" y="{middle:.1f}" '
                f'text-anchor="middle">{escape(texts[line][index])}</text>'
            )
    words = "; ".join(
        f"{row}: " + ", ".join(f"{text} at {column}" for column, text in zip(columns, line, strict=True))
        for row, line in zip(rows, texts, strict=True)
    )
    return _svg(width, height, f"{title}. {meaning}. {words}", parts)


def error_bars(
    points: Sequence[Point],
    title: str,
    meaning: str,
    *,
    x_title: str = "",
    y_title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Draw means with their intervals over an axis of numbers, or side by side when any `x` is a label.

    A point without a mean is left out of the drawing and said in words; one without an interval is hollow. A place
    that a logarithmic axis has not (0) stands at its left end.
    """
    drawn = [point for point in points if point.mean is not None and math.isfinite(point.mean)]
    ends = [end for p in drawn for end in (p.mean, p.low, p.high) if end is not None and math.isfinite(end)]
    log_y = log_y and all(end > 0 for end in ends)
    low, high, ticks = axis_ticks(ends, log_y)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    places, names = _places(points, log_x)
    room = inner_width / len(points) if any(isinstance(point.x, str) for point in points) else inner_width
    labels = [(place, _lines(name, room)) for place, name in names]
    height = HEIGHT + LINE * (max((len(lines) for _, lines in labels), default=1) - 1)

    def up(value: float) -> float:
        above, span = (math.log(max(value, low) / low), math.log(high / low)) if log_y else (value - low, high - low)
        return TOP + (1 - above / span) * inner_height

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for place, lines in labels:
        parts += _label(LEFT + place * inner_width, HEIGHT - BOTTOM + 16, lines)
    if x_title:
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{height - 8}" text-anchor="end">{escape(x_title)}</text>')
    if y_title:
        parts.append(f'<text x="8" y="{height - 8}">{escape(y_title)}</text>')
    for point, place in zip(points, places, strict=True):
        if point not in drawn:
            continue
        assert point.mean is not None
        x, hollow = LEFT + place * inner_width, point.low is None or point.high is None
        if point.low is not None and point.high is not None:
            a, b = up(point.low), up(point.high)
            parts.append(
                f'<path class="bar" d="M{x:.1f} {a:.1f}V{b:.1f}M{x - 5:.1f} {a:.1f}h10M{x - 5:.1f} {b:.1f}h10"/>'
            )
        parts.append(
            f'<circle class="dot{" hollow" * hollow}" cx="{x:.1f}" cy="{up(point.mean):.1f}" r="4.5">'
            f"<title>{escape(_words(point))}</title></circle>"
        )
    return _svg(WIDTH, height, f"{title}. {meaning}. {'; '.join(map(_words, points))}", parts)


def _fullness(value: float, found: Sequence[float], log: bool, lower_is_better: bool) -> float:
    log = log and min(found) > 0
    low, high, here = ((math.log(v) if log else v) for v in (min(found), max(found), value))
    share = (here - low) / (high - low) if high > low else 0.0
    return 0.06 + (STRONGEST - 0.06) * (1 - share if lower_is_better else share)


def _places(points: Sequence[Point], log_x: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Return where along the axis each point stands (0 to 1), and the axis's labels with their places."""
    if any(isinstance(point.x, str) for point in points):
        places = [(index + 0.5) / len(points) for index in range(len(points))]
        return places, [(place, _name(point.x)) for place, point in zip(places, points, strict=True)]
    numbers = [float(point.x) for point in points]
    positive = [x for x in numbers if x > 0]
    if log_x and positive:
        least = min(positive) / (3 if len(positive) < len(numbers) else 1)  # a place of its own for 0
        numbers = [math.log(x if x > 0 else least) for x in numbers]
    low, high = min(numbers), max(numbers)
    span = high - low or 1.0
    places = [0.05 + 0.9 * ((x - low) / span if high > low else 0.5) for x in numbers]
    labels: list[tuple[float, str]] = []
    for place, point in sorted(zip(places, points, strict=True), key=lambda pair: pair[0]):
        name = _name(point.x)
        if not labels or (place - labels[-1][0]) * (WIDTH - LEFT - RIGHT) > LETTER * (len(name) + len(labels[-1][1])):
            labels.append((place, name))
    return places, labels


def _lines(name: str, room: float) -> list[str]:
    """Break a label into lines that fit into so many pixels."""
    return textwrap.wrap(name, max(int(room / LETTER), 4)) or [""]


def _label(x: float, y: float, lines: Sequence[str]) -> list[str]:
    return [
        f'<text x="{x:.1f}" y="{y + LINE * index}" text-anchor="middle">{escape(line)}</text>'
        for index, line in enumerate(lines)
    ]


def _name(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:g}"


def _words(point: Point) -> str:
    interval = f" [{number(point.low)}, {number(point.high)}]" if point.low is not None else ""
    return f"{_name(point.x)}: {number(point.mean)}{interval}"


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" style="max-width:{width:.0f}px" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
