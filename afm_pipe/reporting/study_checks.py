"""Verdicts on the claims that tables are held against, computed from their cells.

A claim says that one group of cells is below another in a measure. Per seed, the measure's mean over either group is
taken and the two are subtracted; over seeds, the differences have a 95 % t-interval. It decides if it excludes zero:

    supported       in the direction claimed
    not supported   in the other
    undecided       otherwise, and always with one seed

A cell without a number, whose loss was not finite, is worse than all that have one: in distances it stands for twice
the worst of its table, enough that seeds which all lost it decide, little enough that one does not drown the others'
differences in its own. A verdict that this would flatter, on the side of the group with such a cell, is not given. Of
its samples none is right, and it did not train. Units are counted, not sampled: they are compared as they are.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from afm_pipe.params import Check, Group, StudyTable
from afm_pipe.reporting import titles
from afm_pipe.reporting.study_trials import ACCURACY, SCOPES, Pair, Studied, StudyCell
from afm_pipe.reporting.table import Cell, Column, Table
from afm_pipe.training.events import ALARMS

Outcome = Literal["supported", "not supported", "undecided", "not run"]
RULE = (
    "Each claim says that some cells are below others in one measure. Per seed, its means over both groups are taken "
    "and compared; the interval is the 95 % t-interval of their difference over seeds (of distances, by the logarithm: "
    "a ratio). A claim is supported if the interval excludes no difference in the direction claimed, not supported if "
    "it does in the other direction, undecided otherwise, and always with one seed. A cell whose loss was not finite "
    "has no number: among distances it stands for twice the worst of its table, and a verdict that this would flatter "
    "is not given. Passes of the generator are counted, so compared as they are. Every interval stands for itself: "
    "among twenty claims, one may pass by chance."
)
WORSE = 2.0  # times the worst distance of its table: what a cell without a number stands for
_SHARES = {"accuracy": "right class", "trained": "share of cells that train", "diverged": "share that diverges"}
_SHARES |= {f"{kind}_alarm": f"share with an alarm of {kind}" for kind in ALARMS}


class Verdict(NamedTuple):
    """What the cells say of a claim. `difference` is less minus than: of logarithms, shares, or units."""

    name: str
    claim: str
    outcome: Outcome
    effect: str = ""
    """In words, with its interval."""
    seeds: int = 0
    difference: float | None = None
    interval: tuple[float, float] | None = None
    studied: Studied | None = None
    """The file it was computed from."""

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, with its effect, seeds and scale."""
        if self.studied is None or not self.seeds:
            return f"Not run: '{self.claim}'."
        alone = " (one seed)" if self.seeds == 1 and self.outcome == "undecided" else ""
        seeds = f"{self.seeds} seeds" if self.seeds > 1 else "one seed"
        over = f"over {seeds} of {SCOPES[self.studied.scope]}"
        seen = ""
        if alone and self.difference:
            seen = ", as claimed" if self.difference < 0 else ", against the claim"
        return f"{self.outcome.capitalize()} at this scale{alone}: '{self.claim}': {self.effect}{seen}, {over}."


class _Sides(NamedTuple):
    """The cells of a claim's two groups in one seed."""

    less: list[StudyCell]
    than: list[StudyCell]


def decide(pair: Pair, trained: float) -> list[Verdict]:
    """Return the verdict on each claim of a table, from the larger study where that has the cells, else our own run.

    `trained` is the share of samples in the class asked for from which a cell counts as trained.
    """
    claims = {check.claim: check for check in (*(pair.study.table.checks if pair.study else ()), *pair.declared.checks)}
    verdicts = []
    for claim in dict.fromkeys([check.claim for check in pair.declared.checks] + list(claims)):
        found = [
            _decided(studied, check, trained)
            for studied in (pair.study, pair.own)
            if studied is not None
            for check in studied.table.checks
            if check.claim == claim
        ]
        verdicts.append(next((each for each in found if each.seeds), Verdict(pair.name, claim, "not run")))
    return verdicts


def _decided(studied: Studied, check: Check, trained: float) -> Verdict:
    sides = _sides(studied, check)
    if not sides:
        return Verdict(studied.name, check.claim, "not run")
    if check.measure == "units":
        return _counted(studied, check, sides)
    differences = [
        statistics.fmean(_values(studied, check, side.less, trained))
        - statistics.fmean(_values(studied, check, side.than, trained))
        for side in sides
    ]
    mean = round(statistics.fmean(differences), 12)  # shares that are equal differ by the rounding of their sums
    # Shares of a few cells come in steps: seeds that agree to the cell are still uncertain by the rounding to one.
    fewest = min(len(sides[0].less), len(sides[0].than))
    interval = t_interval(differences, 0 if check.measure in ("distance", "accuracy") else 1 / fewest / math.sqrt(12))
    if interval is not None and check.measure not in ("distance", "alarms"):
        interval = max(interval[0], -1.0), min(interval[1], 1.0)  # of shares
    unknown = _without_number(studied, check, sides)
    outcome: Outcome = "undecided"
    if interval is not None and interval[1] < 0 and not unknown.less:
        outcome = "supported"
    elif interval is not None and interval[0] > 0 and not unknown.than:
        outcome = "not supported"
    effect = _effect(studied, check, sides, mean, interval, unknown, trained)
    return Verdict(studied.name, check.claim, outcome, effect, len(sides), mean, interval, studied)


def t_interval(values: Sequence[float], least_deviation: float = 0.0) -> tuple[float, float] | None:
    """Return the 95 % t-interval of a mean; None of a single value."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return None
    deviation = max(statistics.stdev(values), least_deviation)
    half = float(stdtrit(len(values) - 1, 0.975)) * deviation / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def _sides(studied: Studied, check: Check) -> list[_Sides]:
    """Return both groups for every seed in which none of their cells is missing; of alarms, none unwatched."""
    found, of_alarms = [], check.measure.endswith(("alarms", "_alarm"))
    for seed in studied.table.seeds:
        less, than = (
            [studied.cells.get((row, column, seed)) for row, column in _places(studied, group)]
            for group in (check.less, check.than)
        )
        complete = _Sides(
            *([c for c in side if c is not None and not (of_alarms and c.events is None)] for side in (less, than))
        )
        if complete.less and len(complete.less) == len(less) and len(complete.than) == len(than):
            found.append(complete)
    return found


def _places(studied: Studied, group: Group) -> list[tuple[str, str]]:
    return [
        (row, column)
        for row, column in studied.places
        if (group.rows is None or row in group.rows) and (group.columns is None or column in group.columns)
    ]


def _values(studied: Studied, check: Check, cells: Sequence[StudyCell], trained: float) -> list[float]:
    """Return the measure of each cell: of distances the logarithm, of yes and no 1 and 0."""
    if check.measure == "distance":
        key = studied.distance_key
        worst = max((v for cell in studied.results.trials if (v := cell.metrics.get(key)) is not None), default=1.0)
        found = [cell.metrics.get(key) for cell in cells]
        return [math.log(max(WORSE * worst if value is None else value, 1e-12)) for value in found]
    if check.measure == "alarms":
        return [float(len(cell.alarms)) for cell in cells]
    if check.measure.endswith("_alarm"):
        return [float(check.measure.removesuffix("_alarm") in cell.alarms) for cell in cells]
    if check.measure == "diverged":
        return [float(cell.diverged is not None) for cell in cells]
    right = [cell.metrics.get(ACCURACY) or 0.0 for cell in cells]
    return right if check.measure == "accuracy" else [float(share >= trained) for share in right]


class _Unknown(NamedTuple):
    """How many cells of a claim's groups have no distance."""

    less: int
    than: int


def _without_number(studied: Studied, check: Check, sides: Sequence[_Sides]) -> _Unknown:
    if check.measure != "distance":
        return _Unknown(0, 0)
    key = studied.distance_key
    return _Unknown(
        sum(cell.metrics.get(key) is None for side in sides for cell in side.less),
        sum(cell.metrics.get(key) is None for side in sides for cell in side.than),
    )


def _effect(
    studied: Studied,
    check: Check,
    sides: Sequence[_Sides],
    mean: float,
    interval: tuple[float, float] | None,
    unknown: _Unknown,
    trained: float,
) -> str:
    """Say how far the groups are apart, as a factor of distances, as points of shares."""
    lower, sign = mean < 0, -1 if mean < 0 else 1
    less, than = (f"for {words}" for words in _group_words(studied.table, check))
    compared = f"{less} than {than}" if mean else f"{less} and {than}"
    word = ("lower" if lower else "higher") if mean else "equal"
    bounds = [sign * end for end in interval or ()]
    if check.measure == "distance":
        below, above = (unknown.less, unknown.than) if lower else (unknown.than, unknown.less)
        bound = "at least " if above and not below else "at most " if below and not above else ""
        factor = f"{bound}{titles.number(math.exp(abs(mean)))} times " if mean else ""
        count = below + above
        stand_in = f" ({count} cell{'s' * (count > 1)} without a number taken as twice the worst of the table)" * bool(
            count
        )
        return f"distance {factor}{word}{_ends([math.exp(end) for end in bounds])} {compared}{_ended(sides)}{stand_in}"
    if check.measure == "alarms":
        fewer = f"{titles.number(abs(mean))} {'fewer' if lower else 'more'}" if mean else "as many"
        return f"kinds of alarms a cell {fewer}{_ends(bounds)} {compared}"
    points = f"{titles.number(abs(100 * mean))} points " if mean else ""
    text = f"{_SHARES[check.measure]} {points}{word}{_ends([100 * end for end in bounds])} {compared}"
    if check.measure == "accuracy":
        return text
    first, second = (
        f"{sum(_values(studied, check, cells, trained)):.0f} of {len(cells)} cells"
        for cells in ([c for side in sides for c in side.less], [c for side in sides for c in side.than])
    )
    return f"{text} ({first} against {second})"


def _ended(sides: Sequence[_Sides]) -> str:
    """Say how many cells of each group diverged, where any did: they may be all that a distance rests on."""
    less, than = ([c for side in sides for c in getattr(side, group)] for group in ("less", "than"))
    first, second = (sum(cell.diverged is not None for cell in cells) for cells in (less, than))
    return f" ({first} of {len(less)} cells diverged against {second} of {len(than)})" if first or second else ""


def _counted(studied: Studied, check: Check, sides: Sequence[_Sides]) -> Verdict:
    less, than = (
        statistics.fmean(cell.cost.units for side in sides for cell in getattr(side, group))
        for group in ("less", "than")
    )
    word, ratio = ("fewer", than / less) if less < than else ("more", less / than)
    compared = "as many" if less == than else f"{titles.number(ratio)} times {word}"
    first, second = _group_words(studied.table, check)
    effect = (
        f"{titles.number(less)} forward passes of G an update for {first} against {titles.number(than)} for {second}, "
        f"{compared}, counted"
    )
    outcome: Outcome = "supported" if less < than else "not supported"
    return Verdict(studied.name, check.claim, outcome, effect, len(sides), less - than, None, studied)


def _group_words(table: StudyTable, check: Check) -> tuple[str, str]:
    """Say which cells either group holds: lambda_ot = 0.2, and 0."""
    axes = ("rows", table.rows), ("columns", table.columns)

    def said(group: Group, titled: bool) -> str:
        parts = [
            (f"{axis.title} = " if titled else "") + " or ".join(labels)
            for name, axis in axes
            if axis is not None and (labels := getattr(group, name)) is not None
        ]
        return ", ".join(parts) or "all cells"

    alike = all((getattr(check.less, name) is None) == (getattr(check.than, name) is None) for name, _ in axes)
    return said(check.less, True), said(check.than, not alike)


def _ends(ends: Sequence[float]) -> str:
    return f" [{titles.number(min(ends))}, {titles.number(max(ends))}]" if ends else ""


def checks_table(verdicts: Sequence[Verdict]) -> Table:
    """Build the table of all verdicts."""
    columns = (
        Column("claim", "Claim", numeric=False),
        Column("table", "Table", numeric=False),
        Column("verdict", "Verdict", numeric=False),
        Column("effect", "Effect", "The group said to be lower against the other", numeric=False),
        Column("difference", "Difference", "Less minus than: of logarithms of distance, shares, or passes; 95 %"),
        Column("seeds", "Seeds"),
        Column("scale", "From", "Whose cells", numeric=False),
    )
    note = (
        "Effect and difference are of the cells said to be lower against the others, paired by seed, with the 95 % "
        "t-interval over seeds; differences of distances are of their logarithms."
    )
    return Table("checks", "What the cells say of each claim.", columns, tuple(map(_row, verdicts)), note=note)


def _row(verdict: Verdict) -> tuple[Cell, ...]:
    studied = verdict.studied
    source, scale = (str(studied.path), Cell(SCOPES[studied.scope], studied.results.scale)) if studied else ("", None)
    return (
        Cell(verdict.claim, verdict.claim),
        Cell(verdict.name, verdict.name),
        Cell(verdict.outcome, verdict.outcome),
        Cell(verdict.effect, verdict.effect),
        Cell(
            titles.number(verdict.difference) + _ends(verdict.interval or ()),
            verdict.difference,
            source,
            f"computed from the cells for {verdict.claim!r}",
            verdict.interval,
        ),
        Cell(str(verdict.seeds), verdict.seeds),
        scale._replace(source=source, key="scale") if scale else Cell("", None),
    )
