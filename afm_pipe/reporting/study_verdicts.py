"""Verdicts on the study's claims in words, and the table of all of them."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import get_args

from afm_pipe.params import Check, Group, StudyTable
from afm_pipe.reporting import titles
from afm_pipe.reporting.section import Section
from afm_pipe.reporting.table import Cell, Column, Table
from afm_pipe.study.results import Scope
from afm_pipe.study.verdicts import Outcome, Side, Verdict
from afm_pipe.training.events import ALARMS

SCOPES: dict[Scope, str] = {"table": "this profile", "study": "the study"}
RULE = (
    "A claim says that one group of trials is below another in one measure. The means of both groups are paired by "
    "seed; the interval is the 95 % t-interval of their difference over seeds (for distances, of the log ratio). A "
    "claim is supported if the interval excludes zero in the claimed direction, not supported if it excludes zero in "
    "the other direction, and undecided otherwise, always so with one seed. A trial with a non-finite loss has no "
    "distance and is taken as twice the worst of its table; no verdict is given that this would favor. Forward passes "
    "are counted and compared exactly. Intervals are not corrected for multiple comparisons: among twenty claims, one "
    "may pass by chance."
)
CHECKS = "checks"  # anchor of the section on all claims
_FRACTIONS = {"accuracy": "class accuracy", "trained": "fraction of trained trials", "diverged": "fraction of diverged"}
_FRACTIONS |= {f"{kind}_alarm": f"fraction with {kind} alarms" for kind in ALARMS}


def verdicts_section(verdicts: Sequence[Verdict], trained: float) -> Section:
    """Build the section on all claims."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    listed = ", ".join(f"{counts[outcome]} {outcome}" for outcome in get_args(Outcome) if counts[outcome])
    small = f"{RULE} A trial counts as trained from a class accuracy of {titles.percent(trained)}."
    summary = f"Of {len(verdicts)} claim{'s' * (len(verdicts) != 1)}: {listed}."
    columns = (
        Column("claim", "Claim", numeric=False),
        Column("table", "Table", numeric=False),
        Column("verdict", "Verdict", numeric=False),
        Column("effect", "Effect", "The group claimed to be lower against the other", numeric=False),
        Column("difference", "Difference", "Less minus than: of log distances, fractions, or forward passes; 95 %"),
        Column("seeds", "Seeds"),
        Column("scale", "From", "Whose trials", numeric=False),
    )
    note = (
        "Effect and difference compare the group claimed to be lower with the other, paired by seed, with the 95 % "
        "t-interval over seeds; differences of distances are of their logarithms."
    )
    first = ("claim", "verdict", "effect", "seeds")
    table = Table("checks", "The verdict on each claim.", columns, tuple(map(_row, verdicts)), note=note, first=first)
    return Section(CHECKS, "Claims and verdicts", verdict=summary, tables=(table,), small=small)


def sentence(verdict: Verdict) -> str:
    """State a verdict in one sentence, with its effect, seeds and scale."""
    claim, outcome, seeds = verdict.check.claim, verdict.outcome, verdict.seeds
    if verdict.results is None:
        return f"Not run: '{claim}'."
    alone = seeds == 1 and outcome == "undecided"
    direction = ""
    if alone and verdict.difference:
        direction = ", as claimed" if verdict.difference < 0 else ", against the claim"
    return (
        f"{outcome.capitalize()} at this scale{' (one seed)' * alone}: '{claim}': {effect(verdict)}{direction}, over "
        f"{f'{seeds} seeds' if seeds > 1 else 'one seed'} of {SCOPES[verdict.results.scope]}."
    )


def effect(verdict: Verdict, brief: bool = False) -> str:
    """Say how much the groups differ: a factor of distances, points of fractions, a count of units or alarms.

    In brief, without the title of the axis and the number of trials.
    """
    results, measure, less, than = verdict.results, verdict.check.measure, verdict.less, verdict.than
    if results is None:
        return ""
    groups = _groups(results.table, verdict.check, titled=not brief)
    if measure == "units":
        return _units(less, than, groups)
    difference = verdict.difference or 0.0
    lower, sign = difference < 0, -1 if difference < 0 else 1
    compared = f"for {groups[0]} {'than' if difference else 'and'} for {groups[1]}"
    word = ("lower" if lower else "higher") if difference else "equal"
    bounds = [sign * end for end in verdict.interval or ()]
    if measure == "distance":
        missing = less.without_distance, than.without_distance
        below, above = missing if lower else missing[::-1]
        bound = "at least " if above and not below else "at most " if below and not above else ""
        factor = f"{bound}{titles.number(math.exp(abs(difference)))} times " if difference else ""
        text = f"distance {factor}{word}{_ends([math.exp(end) for end in bounds])} {compared}"
        if brief:
            return text
        if less.diverged or than.diverged:
            text += f" ({less.diverged} of {less.trials} trials diverged against {than.diverged} of {than.trials})"
        if count := below + above:
            text += f" ({count} trial{'s' * (count > 1)} without a number taken as twice the worst of the table)"
        return text
    size = titles.number(abs(difference if measure == "alarms" else 100 * difference))
    if measure == "alarms":
        fewer = f"{size} {'fewer' if lower else 'more'}" if difference else "equal"
        return f"kinds of alarms per trial {fewer}{_ends(bounds)} {compared}"
    points = f"{size} points " if difference else ""
    text = f"{_FRACTIONS[measure]} {points}{word}{_ends([100 * end for end in bounds])} {compared}"
    if brief or measure == "accuracy":
        return text
    return f"{text} ({less.total:.0f} of {less.trials} trials against {than.total:.0f} of {than.trials} trials)"


def _units(less: Side, than: Side, groups: tuple[str, str]) -> str:
    first, second = less.total / less.trials, than.total / than.trials
    word, ratio = ("fewer", second / first) if first < second else ("more", first / second)
    compared = "equal" if first == second else f"{titles.number(ratio)} times {word}"
    return (
        f"{titles.number(first)} forward passes of G per update for {groups[0]} against {titles.number(second)} for "
        f"{groups[1]}, {compared}, counted"
    )


def _groups(table: StudyTable, check: Check, titled: bool) -> tuple[str, str]:
    """Name the trials of both groups: lambda_ot = 0.2, and 0; untitled: 0.2, and 0."""
    axes = ("rows", table.rows), ("columns", table.columns)

    def name(group: Group, with_title: bool) -> str:
        parts = [
            (f"{axis.title} = " if with_title else "") + " or ".join(labels)
            for key, axis in axes
            if axis is not None and (labels := getattr(group, key)) is not None
        ]
        return ", ".join(parts) or "all trials"

    alike = all((getattr(check.less, key) is None) == (getattr(check.than, key) is None) for key, _ in axes)
    return name(check.less, titled), name(check.than, titled and not alike)


def _ends(ends: Sequence[float]) -> str:
    return f" [{titles.number(min(ends))}, {titles.number(max(ends))}]" if ends else ""


def _row(verdict: Verdict) -> tuple[Cell, ...]:
    claim, results, words = verdict.check.claim, verdict.results, effect(verdict)
    source = str(results.path) if results else ""
    difference = titles.number(verdict.difference) + _ends(verdict.interval or ())
    where = f"computed from the trials for {claim!r}"
    return (
        Cell(claim, claim),
        Cell(verdict.table, verdict.table),
        Cell(verdict.outcome, verdict.outcome),
        Cell(words, words),
        Cell(difference, verdict.difference, source, where, verdict.interval),
        Cell(str(verdict.seeds), verdict.seeds),
        Cell(SCOPES[results.scope], results.scale, source, "scale") if results else Cell("", None),
    )
