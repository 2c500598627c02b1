"""The findings and facts of the summary: verdicts, distance, class accuracy, copies, cost; over seeds if repeated.

Runs are compared over seeds alone. Without a table whose rows are runs, the lowest distance is shown and nothing is
ranked: training with another seed may lie outside the interval of measuring one run.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from afm_pipe.params import Check, Group
from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Inputs, RunRecord
from afm_pipe.reporting.study import ratio_keys, spread_text
from afm_pipe.reporting.study_verdicts import effect
from afm_pipe.runtime import paths
from afm_pipe.study.results import ACCURACY, TableResults, read_tables, runs_over_seeds
from afm_pipe.study.statistics import spread
from afm_pipe.study.verdicts import Verdict, decide, verdict_on

RULE = "95 % t-intervals over seeds of log ratios"


class Fact(NamedTuple):
    """A number of the summary, the words below it, and its file."""

    title: str
    value: str
    words: str
    source: Path


class Finding(NamedTuple):
    """The verdict on a main claim in one line, the section that has its table, and its file."""

    outcome: str
    claim: str
    words: str
    anchor: str
    source: Path


def findings(inputs: Inputs) -> list[Finding]:
    """Return the verdicts on the main claims: those on the runs, then the first of each of the paper's tables."""
    over_seeds = runs_over_seeds(inputs.params)
    on_runs, on_paper = list[Verdict](), list[Verdict]()
    for files in read_tables(inputs.params):
        verdicts = [verdict for verdict in decide(files, inputs.params.study.trained) if verdict.outcome != "not run"]
        if over_seeds is not None and files.name == over_seeds.name:
            on_runs = verdicts
        elif files.declared.paper is not None:
            on_paper += verdicts[:1]
    by_claim = dict[str, Verdict]()
    for verdict in (*on_runs, *on_paper):
        by_claim.setdefault(verdict.check.claim, verdict)
    return [_finding(verdict) for verdict in by_claim.values()]


def _finding(verdict: Verdict) -> Finding:
    assert verdict.results is not None
    words = effect(verdict, brief=True) + ("; one seed" if verdict.seeds == 1 else "")
    anchor = f"study-{verdict.table}"
    return Finding(verdict.outcome, verdict.check.claim, words, anchor, verdict.results.path)


def facts(inputs: Inputs) -> list[Fact]:
    """Return the facts of the summary."""
    results = runs_over_seeds(inputs.params)
    return _of_single_runs(inputs) if results is None or not results.distance_key else _over_seeds(inputs, results)


def lowest_run(inputs: Inputs) -> str:
    """Return the run with the lowest distance, over seeds where runs were repeated; the first without distances."""
    results = runs_over_seeds(inputs.params)
    name = results.table.runs[lowest_row(results)] if results is not None and results.distance_key else ""
    single = _lowest(inputs.runs)[1] or inputs.runs[0]
    return name if name in inputs.params.names else single.name


def lowest_row(results: TableResults) -> str:
    """Return the row with the lowest mean distance over seeds, before any that lacks the distance of a seed."""

    def rank(row: str) -> tuple[int, float]:
        found = spread(results.at(row, ""), results.distance_key)
        missing = len(results.table.seeds) - len(found.values)
        return missing, float("inf") if found.mean is None else found.mean

    return min(results.rows, key=rank)


def rivals(results: TableResults, lowest: str, trained: float) -> list[str]:
    """Return the rows whose distance is not distinguishable from the lowest, given the spread over seeds."""
    near = []
    for row in results.rows:
        check = Check(claim="", measure="distance", less=_only(lowest), than=_only(row))
        if row != lowest and verdict_on(results, check, trained).outcome != "supported":
            near.append(row)
    return near


def _only(row: str) -> Group:
    return Group(rows=(row,))


def _over_seeds(inputs: Inputs, results: TableResults) -> list[Fact]:
    """Return the facts of the run with the lowest distance, over seeds."""
    row = lowest_row(results)
    trials, name = results.at(row, ""), results.table.runs[row]
    count = len(spread(trials, results.distance_key).values)
    of_run = f"run {name}, mean ± standard deviation over {count} seeds" if count > 1 else f"run {name}, one seed"
    found = []

    def add(title: str, key: str, words: str) -> None:
        text = spread_text(spread(trials, key))
        if text != titles.MISSING:
            found.append(Fact(title, text, words, results.path))

    key = results.distance_key
    floor = inputs.summary.floor(titles.base_key(key))
    words = f"{titles.metric(key).title}, {of_run}; {_comparison(inputs, results, row)}"
    words += f"; reconstructed real images have {titles.number(floor)}" if floor is not None else ""
    add("Lowest distance", key, words)
    for ratio in ratio_keys(results):
        add("Distance ratio", ratio, f"{titles.metric(ratio).title}, run {name}: 1 is real")
    add("Class accuracy", ACCURACY, _accuracy_words(inputs, name))
    add("Copies", "copies", _copies_words(name))
    seconds = [trial.cost.seconds for trial in trials if trial.cost.seconds is not None]
    if seconds:
        words = f"of run {name}, mean over {len(seconds)} seeds, {results.machine}"
        found.append(Fact("Training time", titles.duration(statistics.fmean(seconds)), words, results.path))
    return found


def _comparison(inputs: Inputs, results: TableResults, lowest: str) -> str:
    """Say which runs are not distinguishable from the lowest, and by what rule."""
    if len(results.rows) == 1:
        return "the only run"
    if len(results.table.seeds) == 1:
        return "the lowest; one seed ranks nothing"
    near = [results.table.runs[row] for row in rivals(results, lowest, inputs.params.study.trained)]
    if not near:
        return f"lower than every other run ({RULE})"
    return f"the lowest; over these seeds the difference from {', '.join(near)} is undecided ({RULE})"


def _of_single_runs(inputs: Inputs) -> list[Fact]:
    """Return the facts of the single run with the lowest distance, without a ranking."""
    found = []
    key, lowest = _lowest(inputs.runs)
    if lowest is not None:
        floor = inputs.summary.floor(titles.base_key(key))
        words = f"{titles.metric(key).title}, run {lowest.name}, one seed"
        words += ", the lowest; one seed ranks nothing" if len(inputs.runs) > 1 else ""
        words += f"; reconstructed real images have {titles.number(floor)}" if floor is not None else ""
        source = paths.metrics(lowest.name)
        found.append(Fact("Lowest distance", titles.metric_text(key, lowest.metrics[key]), words, source))
        relative = f"ratio_{titles.base_key(key)}"
        ratio = next((each for each in titles.in_order(lowest.metrics) if titles.base_key(each) == relative), None)
        if ratio is not None:
            words = f"{titles.metric(ratio).title}, run {lowest.name}: 1 is real"
            if (ends := lowest.intervals.get(ratio)) is not None:
                words += f"; 95 % interval of measuring {' to '.join(titles.metric_text(ratio, end) for end in ends)}"
            found.append(Fact("Distance ratio", titles.metric_text(ratio, lowest.metrics[ratio]), words, source))
    shown = lowest or inputs.runs[0]
    source = paths.metrics(shown.name)
    for title, key, words in (
        ("Class accuracy", ACCURACY, _accuracy_words(inputs, shown.name)),
        ("Copies", "copies", _copies_words(shown.name)),
    ):
        if shown.metrics.get(key) is not None:
            found.append(Fact(title, titles.percent(shown.metrics[key]), words, source))
    if shown.cost is not None:
        images, rate = titles.number(shown.cost.images), titles.number(shown.cost.images_per_second)
        words = f"of run {shown.name}, for {images} images, {rate} a second, {shown.cost.machine}"
        found.append(Fact("Training time", titles.duration(shown.cost.seconds), words, paths.costs(shown.name)))
    return found


def _accuracy_words(inputs: Inputs, run: str) -> str:
    summary = inputs.summary
    accuracy = (summary.held_out or {}).get("class_accuracy", summary.classifier_accuracy)
    real = ""
    if isinstance(accuracy, float):
        real = f"; the classifier is right on {titles.percent(accuracy)} of real images that it never saw"
    return f"of the samples of run {run} show their class{real}"


def _copies_words(run: str) -> str:
    return f"of the samples of run {run} are nearly a training image; new real images would give about 0.1 %"


def _lowest(runs: Sequence[RunRecord]) -> tuple[str, RunRecord | None]:
    """Return the run with the lowest distance, in the first distance that most runs have; None without any."""
    values = {
        key: {run.name: value for run in runs if (value := run.metrics.get(key)) is not None}
        for key in titles.in_order(key for run in runs for key in run.metrics if titles.is_distance(key))
    }
    key = max(values, key=lambda key: len(values[key]), default="")
    found = [run for run in runs if run.name in values.get(key, ())]
    return key, min(found, key=lambda run: values[key][run.name], default=None)
