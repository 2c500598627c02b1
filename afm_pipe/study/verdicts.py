"""Verdicts on the claims of tables, computed from their trials.

A claim says that one group of trials is below another in a measure. For each seed, the means of the measure over both
groups are subtracted. The 95 % t-interval of the differences over seeds decides if it excludes zero:

    supported       in the claimed direction
    not supported   in the other direction
    undecided       otherwise, and always with one seed

A trial with a non-finite loss has no distance and counts as worse than every other trial, with twice the worst distance
of its table: enough to decide if it happens for every seed, too little to outweigh the differences of the other seeds.
No verdict is given that this would favor. Its class accuracy is 0, and it did not train. Units are counted exactly and
compared as they are.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from afm_pipe.params import Check
from afm_pipe.params.study import Place
from afm_pipe.study.results import ACCURACY, TableFiles, TableResults, TrialResult
from afm_pipe.study.statistics import t_interval

Outcome = Literal["supported", "not supported", "undecided", "not run"]
Measurement = Callable[[TrialResult], float]
WORSE = 2.0  # times the worst distance of the table: the distance assigned to a trial that has none


class Side(NamedTuple):
    """One group of a claim, over all seeds."""

    trials: int = 0
    total: float = 0.0
    """The sum of the measure."""
    diverged: int = 0
    without_distance: int = 0
    """Trials without a distance, if the measure is the distance."""


class Verdict(NamedTuple):
    """The outcome of a claim. `difference` is less minus than: of log distances, fractions, alarms, or units."""

    table: str
    check: Check
    outcome: Outcome
    seeds: int = 0
    difference: float | None = None
    interval: tuple[float, float] | None = None
    less: Side = Side()
    than: Side = Side()
    results: TableResults | None = None


def decide(files: TableFiles, trained: float) -> list[Verdict]:
    """Return the verdict on each claim of a table, from the larger study if it has the trials, else from our own run.

    `trained` is the class accuracy from which a trial counts as trained.
    """
    declared = [*files.declared.checks, *(files.study.table.checks if files.study else ())]
    verdicts: dict[str, Verdict] = {}
    for check in declared:
        if check.claim not in verdicts:
            candidates = (
                verdict_on(results, each, trained)
                for results in (files.study, files.own)
                if results is not None
                for each in results.table.checks
                if each.claim == check.claim
            )
            not_run = Verdict(files.name, check, "not run")
            verdicts[check.claim] = next((each for each in candidates if each.seeds), not_run)
    return list(verdicts.values())


def verdict_on(results: TableResults, check: Check, trained: float) -> Verdict:
    """Return the verdict on one claim from one file of results."""
    pairs = _pairs(results, check)
    if not pairs:
        return Verdict(results.name, check, "not run")
    measure = _measure(results, check, trained)
    less, than = (_side(results, check, [trial for pair in pairs for trial in pair[i]], measure) for i in (0, 1))
    if check.measure == "units":
        difference = less.total / less.trials - than.total / than.trials
        outcome: Outcome = "supported" if difference < 0 else "not supported"
        return Verdict(results.name, check, outcome, len(pairs), difference, None, less, than, results)
    means = [[statistics.fmean(map(measure, group)) for group in pair] for pair in pairs]
    differences = [of_less - of_than for of_less, of_than in means]
    difference = round(statistics.fmean(differences), 12)  # sums of equal fractions may differ by rounding
    # Fractions of a few trials change in steps: even if all seeds agree, they are uncertain by the rounding to a step.
    steps = 0 if check.measure in ("distance", "accuracy") else 1 / min(map(len, pairs[0])) / math.sqrt(12)
    interval = t_interval(differences, steps)
    if interval is not None and check.measure not in ("distance", "alarms"):
        interval = max(interval[0], -1.0), min(interval[1], 1.0)  # of fractions
    outcome = "undecided"
    if interval is not None and interval[1] < 0 and not less.without_distance:
        outcome = "supported"
    elif interval is not None and interval[0] > 0 and not than.without_distance:
        outcome = "not supported"
    return Verdict(results.name, check, outcome, len(pairs), difference, interval, less, than, results)


def _pairs(results: TableResults, check: Check) -> list[tuple[list[TrialResult], ...]]:
    """Return both groups for every seed that has all their trials; for alarms, all trials must be monitored."""
    pairs = []
    groups = [[cell for cell in results.cells if group.selects(*cell)] for group in (check.less, check.than)]
    for seed in results.table.seeds:
        found = [[results.by_place.get(Place(*cell, seed)) for cell in cells] for cells in groups]
        complete = tuple([trial for trial in group if trial and _usable(trial, check)] for group in found)
        if complete[0] and list(map(len, complete)) == list(map(len, groups)):
            pairs.append(complete)
    return pairs


def _usable(trial: TrialResult, check: Check) -> bool:
    return trial.events is not None or not check.measure.endswith(("alarms", "_alarm"))


def _side(results: TableResults, check: Check, trials: Sequence[TrialResult], measure: Measurement) -> Side:
    return Side(
        len(trials),
        math.fsum(map(measure, trials)),
        sum(trial.diverged is not None for trial in trials),
        sum(check.measure == "distance" and trial.metrics.get(results.distance_key) is None for trial in trials),
    )


def _measure(results: TableResults, check: Check, trained: float) -> Measurement:
    """Return the function that measures a trial: the logarithm of a distance; 1 and 0 for yes and no."""
    key = results.distance_key
    distances = [value for trial in results.trials if (value := trial.metrics.get(key)) is not None]
    worst = WORSE * max(distances, default=1.0)

    def distance(trial: TrialResult) -> float:
        value = trial.metrics.get(key)
        return math.log(max(worst if value is None else value, 1e-12))

    def accuracy(trial: TrialResult) -> float:
        return trial.metrics.get(ACCURACY) or 0.0

    measures: dict[str, Measurement] = {
        "distance": distance,
        "accuracy": accuracy,
        "trained": lambda trial: float(accuracy(trial) >= trained),
        "diverged": lambda trial: float(trial.diverged is not None),
        "units": lambda trial: trial.cost.units,
        "alarms": lambda trial: float(len(trial.alarms)),
    }
    alarm = check.measure.removesuffix("_alarm")
    return measures.get(check.measure, lambda trial: float(alarm in trial.alarms))
