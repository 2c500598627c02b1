"""Training curves as SVG: a panel per logged term, all runs over a common axis of images seen."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from afm_pipe.objectives import find_objective
from afm_pipe.objectives.base import Term
from afm_pipe.reporting.inputs import RunRecord
from afm_pipe.reporting.plots import LIGHT, Axis, short, stylesheet, svg, text
from afm_pipe.reporting.section import Figure
from afm_pipe.reporting.titles import number

MAX_POINTS = 150  # per line; more rows are averaged in bins
WIDTH, HEIGHT = 340, 200  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 34
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # where colors repeat


class Mark(NamedTuple):
    """An event of a run at a number of images seen: the end of a phase, or an intervention."""

    images: float
    text: str
    intervention: bool


class Line(NamedTuple):
    """A run in a panel: its place among the runs, its points and marks."""

    place: int
    name: str
    x: np.ndarray
    y: np.ndarray
    marks: list[Mark]


def logged_terms(runs: Sequence[RunRecord]) -> list[Term]:
    """Return the terms that the objectives of these runs log, each once; those that the monitor reads come first."""
    objectives = [find_objective(run.settings.objective) for run in runs if run.settings]
    terms = [term for objective in objectives for term in (*objective.terms, *objective.scheduled)]
    terms.append(Term("lr", "Learning rate", "As scheduled"))
    return sorted({term.name: term for term in terms}.values(), key=lambda term: term.role is None)


def marks_of(run: RunRecord, images_per_epoch: int) -> list[Mark]:
    """Return the ends of a run's phases and its interventions, ordered by images seen.

    A reload that params declare is marked at the start of its phase, a logged event where it happened.
    """
    marks, start = [], 0.0
    phases = run.settings.phases if run.settings else ()
    for phase in phases:
        if phase.reload_ema == "epoch":
            marks.append(Mark(start, "G reloaded from its moving average, then after every epoch", True))
        if isinstance(phase.reload_discriminator, float):  # reloads on a stall are logged events
            marks.append(Mark(start, f"D reloaded from epoch {phase.reload_discriminator:g}", True))
        start = phase.until_epoch * images_per_epoch
        if phase is not phases[-1]:
            marks.append(Mark(start, f"a phase ends: epoch {phase.until_epoch:g}", False))
    for event in run.events:
        action = f"; {event.action}" if event.action else ""
        marks.append(Mark(event.images, f"{event.kind}: {event.text}{action} (update {event.update:,})", True))
    return sorted(set(marks))


def draw_panels(runs: Sequence[RunRecord], images_per_epoch: int, only: RunRecord | None = None) -> list[Figure]:
    """Draw a panel for each term that changes in any run; lines break where a value is not finite.

    With `only`, that run alone is drawn, in the color it has among the runs.
    """
    drawn = [(index, run) for index, run in enumerate(runs) if only is None or run is only]
    panels = []
    for term in logged_terms(runs):
        if len({value for _, run in drawn for value in run.curve.get(term.name, ())}) > 1:
            lines = [
                Line(index, run.name, *_points(run.curve, term.name), _visible(run, marks_of(run, images_per_epoch)))
                for index, run in drawn
            ]
            panels.append(Figure(_panel(term, lines), term.help))
    return panels


def draw_sheet(panels: Sequence[Figure], names: Sequence[str], columns: int = 3) -> str:
    """Put all panels and a legend into one self-contained SVG file."""
    head = 20 * math.ceil(len(names) / columns) + 16
    width, height = columns * WIDTH, head + math.ceil(len(panels) / columns) * HEIGHT
    parts = [
        f'<g transform="translate({index % columns * WIDTH + LEFT} {index // columns * 20 + 16})">'
        f"{_key_line(index)}{text(34, 4, name)}</g>"
        for index, name in enumerate(names)
    ]
    for index, panel in enumerate(panels):
        place = f'<svg x="{index % columns * WIDTH}" y="{head + index // columns * HEIGHT}" '
        parts.append(panel.svg.replace("<svg ", f'{place}width="{WIDTH}" height="{HEIGHT}" ', 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{stylesheet()}</style>"
        f'<rect width="{width}" height="{height}" fill="var(--surface)"/>{"".join(parts)}</svg>\n'
    )


def legend(runs: Sequence[RunRecord]) -> list[tuple[str, Markup]]:
    """Return the runs' names with a piece of their lines."""
    return [
        (
            run.name,
            Markup(
                '<svg class="key" viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
                f'<g transform="translate(0 4)">{_key_line(index)}</g></svg>'
            ),
        )
        for index, run in enumerate(runs)
    ]


def _visible(run: RunRecord, marks: list[Mark]) -> list[Mark]:
    """Drop marks from before the start of a run's own curve, which belong to the run it continues."""
    rows = run.curve.get("images", [])
    interval = rows[1] - rows[0] if len(rows) > 1 else 0.0
    return [mark for mark in marks if not rows or rows[0] <= mark.images + interval or rows[0] <= interval]


def _points(curve: dict[str, list[float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images seen and values, averaged in bins where there are many."""
    images = np.asarray(curve["images"])
    values = np.asarray(curve.get(name, [math.nan] * len(images)))
    bins = min(MAX_POINTS, len(images))
    edges = [len(images) * index // bins for index in range(bins + 1)]
    spans = list(zip(edges, edges[1:], strict=False))
    return np.array([images[a:b].mean() for a, b in spans]), np.array([values[a:b].mean() for a, b in spans])


def _panel(term: Term, lines: list[Line]) -> str:
    axis = Axis.around(np.concatenate([line.y for line in lines]), term.log, trim=1)
    images = Axis(0.0, max(float(line.x[-1]) for line in lines) or 1.0)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    paths = "".join(
        f'<path class="line" {_stroke(line.place)} d="{path}"><title>{escape(line.name)}</title></path>'
        for line in lines
        for path in (_path(images.place(line.x) * width, _up(axis, line.y, height)),)
    )
    marks = "".join(
        _mark(line, mark, float(images.place(mark.images)) * width, axis, height, alone=len(lines) == 1)
        for line in lines
        for mark in line.marks
    )
    ends = "; ".join(f"{line.name} ends at {number(_last(line.y))}" for line in lines)
    parts = [
        text(LEFT, 14, term.title, kind="title"),
        axis.rules(LEFT, WIDTH - RIGHT, TOP, height),
        *(
            text(LEFT + float(images.place(tick)) * width, HEIGHT - BOTTOM + 15, short(tick), "middle")
            for tick in images.ticks()
        ),
        text(WIDTH - RIGHT, HEIGHT - 5, "images seen", "end"),
        f'<svg x="{LEFT}" y="{TOP}" width="{width}" height="{height}">{paths}{marks}</svg>',
    ]
    return svg(WIDTH, HEIGHT, f"{term.title} over images seen by the generator: {ends}", parts)


def _mark(line: Line, mark: Mark, x: float, axis: Axis, height: int, alone: bool) -> str:
    """Draw a mark: across the panel if it shows a single run, else as a symbol on the run's line."""
    title = f"<title>{escape(f'{line.name}: {mark.text}')}</title>"
    color, shape = "var(--muted)", f"M{x:.1f} 0V{height}"
    if not alone:
        finite = np.isfinite(line.y)
        if not finite.any():
            return ""
        y = float(_up(axis, np.interp(mark.images, line.x[finite], line.y[finite]), height))
        if not math.isfinite(y):
            return ""
        shape = f"M{x - 4:.1f} {y:.1f}l4 -4l4 4l-4 4z" if mark.intervention else f"M{x:.1f} {y - 4:.1f}v8"
        color = f"var(--run-{line.place % len(LIGHT)})"
    kind = "mark" + " intervention" * mark.intervention
    return f'<path class="{kind}" style="stroke:{color}" d="{shape}">{title}</path>'


def _up(axis: Axis, values: np.ndarray | float, height: int) -> np.ndarray:
    return (1 - axis.place(values)) * height


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Return the path of a line, with a gap where a value is not finite."""
    parts, pen = [], "M"
    for across, up in zip(x, y, strict=True):
        if math.isfinite(up):
            parts.append(f"{pen}{across:.1f} {min(max(up, -999.0), 9999.0):.1f}")
        pen = "L" if math.isfinite(up) else "M"
    return "".join(parts)


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else None


def _stroke(index: int) -> str:
    dash = DASHES[index // len(LIGHT) % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'style="stroke:var(--run-{index % len(LIGHT)})"{dashed}'


def _key_line(index: int) -> str:
    return f'<path class="line" {_stroke(index)} d="M0 0L28 0"/>'
