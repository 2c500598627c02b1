"""Training curves as SVG: one panel per quantity, all runs over a common axis of images seen.

Colours are CSS variables, so that one drawing serves light, dark and print. Text only: same input, same bytes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from afm_pipe.reporting.inputs import RunRecord
from afm_pipe.reporting.titles import number

MAX_POINTS = 150  # per line; more rows are averaged in bins
WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 34  # margins of a panel, where its title and axes stand

LIGHT = ("#1f6fb5", "#c4511a", "#2b8a3e", "#8b46b5", "#9a7200", "#0c7f81", "#c2255c", "#555b63")
DARK = ("#6cb2f0", "#f4915b", "#69c77b", "#c792ea", "#e0b84c", "#4fd1c5", "#f783ac", "#b4bbc4")
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # so that colours may repeat


class Quantity(NamedTuple):
    """One panel: a column of the curves, its title, what it tells, and whether its axis is logarithmic."""

    key: str
    title: str
    meaning: str
    log: bool = False


class Line(NamedTuple):
    """One run in a panel: its place among the runs, and its points."""

    place: int
    name: str
    x: np.ndarray
    y: np.ndarray
    marks: "list[Mark]"


class Panel(NamedTuple):
    """A drawn panel with what its readers need to know."""

    quantity: Quantity
    svg: str


QUANTITIES = (
    Quantity("logit_gap", "Logit gap", "Mean D(x) − D(G(z)): how far the discriminator tells real from generated"),
    Quantity("d_accuracy", "Discriminator's accuracy", "Share of pairs with D(x) > D(G(z)); one half: it cannot tell"),
    Quantity("transport_rms", "Way from noise", "rms(G(z) − z): 0 would be a generator that returns its noise"),
    Quantity("d_adversarial", "Discriminator's adversarial loss", "softplus(−(D(x) − D(G(z)))); 0.69: undecided"),
    Quantity("g_adversarial", "Generator's adversarial loss", "softplus(−(D(G(z)) − D(x)))"),
    Quantity("g_transport", "Transport loss", "Mean squared way from noise to sample"),
    Quantity("transport", "Transport weight", "λ_ot as scheduled"),
    Quantity("r1", "R1 penalty", "Squared slope of D at real latents, log scale", log=True),
    Quantity("r2", "R2 penalty", "Squared slope of D at generated latents, log scale", log=True),
    Quantity("logit_centering", "Logit logit_centering", "Mean (D(x) + D(G(z)))², log scale", log=True),
    Quantity("output_scale", "Size of samples", "rms(G(z)) over rms(x): far above 1, the training diverges"),
    Quantity(
        "g_adv_output_grad_norm", "Adversarial gradient at G's output", "Norm, as D gives it, log scale", log=True
    ),
    Quantity(
        "g_transport_output_grad_norm",
        "Transport gradient at G's output",
        "Norm, with guidance's if any, log scale",
        log=True,
    ),
    Quantity("d_grad_norm", "Discriminator's gradient norm", "Log scale", log=True),
    Quantity("g_grad_norm", "Generator's gradient norm", "Log scale", log=True),
    Quantity("lr", "Learning rate", "As scheduled"),
)


class Mark(NamedTuple):
    """What happened to a run at a number of images seen: the end of a phase, or an intervention."""

    images: float
    text: str
    intervention: bool


def marks_of(run: RunRecord, images_per_epoch: int) -> list[Mark]:
    """Return where a run's phases end and where someone or something intervened, in the order of the images seen.

    Reloads that params ask for stand at the start of their phase; what was written down while it trained stands where
    it happened.
    """
    marks, started = [], 0.0
    for phase in run.settings.phases if run.settings else ():
        until = phase.until_epoch * images_per_epoch
        if phase.reload_ema == "epoch":
            marks.append(Mark(started, "G reloaded from its moving average, then after every epoch", True))
        if isinstance(phase.reload_discriminator, float):  # on a stall, there are events
            marks.append(Mark(started, f"D reloaded from epoch {phase.reload_discriminator:g}", True))
        if phase is not run.settings.phases[-1]:  # type: ignore[union-attr]
            marks.append(Mark(until, f"a phase ends: epoch {phase.until_epoch:g}", False))
        started = until
    for event in run.events:
        action = f"; {event.action}" if event.action else ""
        marks.append(Mark(event.images, f"{event.kind}: {event.text}{action} (update {event.update:,})", True))
    return sorted(set(marks))


def _on(run: RunRecord, marks: list[Mark]) -> list[Mark]:
    """Leave out what happened before a run's own curve, in the run it continues, but for where it begins."""
    rows = run.curve.get("images", [])
    apart = rows[1] - rows[0] if len(rows) > 1 else 0.0
    return [mark for mark in marks if not rows or rows[0] <= mark.images + apart or rows[0] <= apart]


def draw_panels(runs: Sequence[RunRecord], images_per_epoch: int, alone: RunRecord | None = None) -> list[Panel]:
    """Draw a panel for each known quantity that changes in any run; lines break where a value is not finite.

    With `alone` only that run is drawn, in the colour it has among the runs.
    """
    drawn = [(index, run) for index, run in enumerate(runs) if alone is None or run is alone]
    return [
        Panel(
            quantity,
            _panel(
                quantity,
                [
                    Line(index, run.name, *_line(run.curve, quantity.key), _on(run, marks_of(run, images_per_epoch)))
                    for index, run in drawn
                ],
            ),
        )
        for quantity in QUANTITIES
        if len({value for _, run in drawn for value in run.curve.get(quantity.key, ())}) > 1
    ]


def draw_sheet(panels: Sequence[Panel], names: Sequence[str], columns: int = 3) -> str:
    """Put all panels and a legend into one SVG file that stands alone."""
    head = 20 * math.ceil(len(names) / columns) + 16
    rows = math.ceil(len(panels) / columns)
    parts = [
        f'<g transform="translate({index % columns * WIDTH + LEFT} {index // columns * 20 + 16})">'
        f'{_key_line(index)}<text x="34" y="4">{escape(name)}</text></g>'
        for index, name in enumerate(names)
    ]
    for index, panel in enumerate(panels):
        place = f'<svg x="{index % columns * WIDTH}" y="{head + index // columns * HEIGHT}" '
        parts.append(panel.svg.replace("<svg ", f'{place}width="{WIDTH}" height="{HEIGHT}" ', 1))
    width, height = columns * WIDTH, head + rows * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{palette_css()}\n{PANEL_CSS}</style>"
        f'<rect width="{width}" height="{height}" fill="var(--surface)"/>{"".join(parts)}</svg>\n'
    )


def legend_key(index: int) -> str:
    """Draw the piece of line that stands for the run at `index` in a legend."""
    return (
        '<svg class="key" viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
        f'<g transform="translate(0 4)">{_key_line(index)}</g></svg>'
    )


def palette_css() -> str:
    """Return the CSS variables of the lines' colours and of the panels' ink, for light and dark."""
    light = ";".join(f"--run-{index}:{colour}" for index, colour in enumerate(LIGHT))
    dark = ";".join(f"--run-{index}:{colour}" for index, colour in enumerate(DARK))
    return (
        f":root{{{light};--surface:#fff;--ink:#1c2127;--muted:#59636e;--rule:#dfe3e8}}\n"
        "@media screen and (prefers-color-scheme: dark)"
        f"{{:root{{{dark};--surface:#171b20;--ink:#e7eaee;--muted:#a0abb7;--rule:#323a43}}}}"
    )


PANEL_CSS = """svg text{font:11px system-ui,sans-serif;fill:var(--muted)}
svg text.title{font-weight:600;font-size:12px;fill:var(--ink)}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .line{fill:none;stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}
svg .mark{fill:none;stroke-width:2;stroke-dasharray:none}
svg .mark.intervention{fill:var(--surface)}"""


def _line(curve: dict[str, list[float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images seen and values, averaged in bins when there are many."""
    images = np.asarray(curve["images"])
    values = np.asarray(curve.get(key, [math.nan] * len(images)))
    bins = min(MAX_POINTS, len(images))
    edges = [len(images) * index // bins for index in range(bins + 1)]
    spans = list(zip(edges, edges[1:], strict=False))
    return np.array([images[a:b].mean() for a, b in spans]), np.array([values[a:b].mean() for a, b in spans])


def _panel(quantity: Quantity, lines: list[Line]) -> str:
    values = np.concatenate([line.y for line in lines])
    values = values[np.isfinite(values)]
    log = quantity.log and bool((values > 0).any())
    low, high = _range(values[values > 0] if log else values, log)
    last = max(float(line.x[-1]) for line in lines) or 1.0
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(images: np.ndarray | float) -> np.ndarray:
        return np.asarray(images) / last * inner_width

    def up(value: np.ndarray | float) -> np.ndarray:
        value = np.asarray(value, dtype=float)
        if log:
            value = np.log10(np.where(value > 0, value, math.nan))
            return (1 - (value - math.log10(low)) / (math.log10(high) - math.log10(low))) * inner_height
        return (1 - (value - low) / (high - low)) * inner_height

    rules = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{TOP + y:.1f}" y2="{TOP + y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{TOP + y + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        for tick in (_log_ticks(low, high) if log else _ticks(low, high))
        for y in (float(up(tick)),)
    )
    axis = "".join(
        f'<text x="{LEFT + float(across(tick)):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">'
        f"{short(tick)}</text>"
        for tick in _ticks(0, last)
    )
    drawn = "".join(
        f'<path class="line" {_stroke(each.place)} d="{_path(across(each.x), up(each.y))}">'
        f"<title>{escape(each.name)}</title></path>"
        for each in lines
    )
    for each in lines:
        for mark in each.marks:
            drawn += _draw_mark(each, mark, float(across(mark.images)), up, inner_height if len(lines) == 1 else 0)
    ends = "; ".join(f"{each.name} ends at {number(_last(each.y))}" for each in lines)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{quantity.title} over images seen by the generator: {ends}")}">'
        f'<text class="title" x="{LEFT}" y="14">{escape(quantity.title)}</text>{rules}{axis}'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">images seen</text>'
        f'<svg x="{LEFT}" y="{TOP}" width="{inner_width}" height="{inner_height}">{drawn}</svg></svg>'
    )


def _draw_mark(line: Line, mark: Mark, x: float, up: Callable[[float], np.ndarray], height: int) -> str:
    """Draw a mark: with a `height` (a run alone) as a line across the panel, else as a sign on the run's own line."""
    title = f"<title>{escape(f'{line.name}: {mark.text}')}</title>"
    kind = "mark intervention" if mark.intervention else "mark"
    if height:
        return f'<path class="{kind}" style="stroke:var(--muted)" d="M{x:.1f} 0V{height}">{title}</path>'
    finite = np.isfinite(line.y)
    if not finite.any():
        return ""
    y = float(up(float(np.interp(mark.images, line.x[finite], line.y[finite]))))
    if not math.isfinite(y):
        return ""
    shape = f"M{x - 4:.1f} {y:.1f}l4 -4l4 4l-4 4z" if mark.intervention else f"M{x:.1f} {y - 4:.1f}v8"
    colour = f"var(--run-{line.place % len(LIGHT)})"
    return f'<path class="{kind}" style="stroke:{colour}" d="{shape}">{title}</path>'


def _range(values: np.ndarray, log: bool) -> tuple[float, float]:
    """Return the ends of an axis that holds all but the most extreme hundredth of the values on either side."""
    if not len(values):
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = (float(edge) for edge in np.percentile(values, (1, 99)))
    if log:
        return low / 1.3, high * 1.3
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low <= 0.3 * high else low - pad), high + pad


def axis_ticks(values: Sequence[float], log: bool) -> tuple[float, float, list[float]]:
    """Return the ends of an axis that holds all of some values with room to spare, and its ticks."""
    if not values:
        return 0.0, 1.0, [0.0, 0.5, 1.0]
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.3, high * 1.3
        return low, high, _log_ticks(low, high)
    pad = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = (0.0 if 0 <= low <= 0.5 * high else low - pad), high + pad
    return low, high, _ticks(low, high)


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= max(factor for factor in (1, 2, 5, 10) if factor == 1 or (high - low) / (step * factor) >= 2.5)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 2:
            return ticks[:: math.ceil(len(ticks) / 5)]
    return _ticks(low, high)


def _path(across: np.ndarray, up: np.ndarray) -> str:
    parts, pen = [], "M"
    for x, y in zip(across, up, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {min(max(y, -999.0), 9999.0):.1f}")
        pen = "L"
    return "".join(parts)


def short(value: float) -> str:
    """Print a tick: 20k, 0.05, 1e-5."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}".replace("e-0", "e-")


def _last(values: Iterable[float]) -> float | None:
    finite = [float(value) for value in values if math.isfinite(value)]
    return finite[-1] if finite else None


def _stroke(index: int) -> str:
    dash = DASHES[index // len(LIGHT) % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'style="stroke:var(--run-{index % len(LIGHT)})"{dashed}'


def _key_line(index: int) -> str:
    return f'<path class="line" {_stroke(index)} d="M0 0L28 0"/>'
