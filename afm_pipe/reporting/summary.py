"""The figures of the summary: how good, how right, how original, at what cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Inputs, RunRecord
from afm_pipe.reporting.ranking import overlap
from afm_pipe.runtime import paths


class Fact(NamedTuple):
    """A figure of the summary, the words under it, and the file it was read from."""

    title: str
    value: str
    words: str
    source: Path


def facts(inputs: Inputs) -> list[Fact]:
    """Return the figures that answer at a glance: how good, how right, how original, at what cost."""
    found = []
    key, best = _best(inputs.runs)
    if best is not None:
        floor = inputs.summary.floor(titles.base_key(key))
        words = f"{titles.metric(key).title}, run {best.name}, the lowest"
        words += _told_apart(inputs.runs, best, key)
        words += f"; reconstructed real images have {titles.number(floor)}" if floor is not None else ""
        found.append(Fact("Best distance", titles.metric_text(key, best.metrics[key]), words, paths.metrics(best.name)))
    shown = best or inputs.runs[0]
    source = paths.metrics(shown.name)
    if shown.metrics.get("class_accuracy") is not None:
        words = f"of {shown.name}'s samples show the class asked for"
        accuracy = inputs.summary.classifier_accuracy
        words += f"; the classifier is right on {titles.percent(accuracy)} of held-out real images" if accuracy else ""
        found.append(Fact("Right class", titles.percent(shown.metrics["class_accuracy"]), words, source))
    if shown.metrics.get("copies") is not None:
        words = f"of {shown.name}'s samples are nearly a training image; new real images would give about 0.1 %"
        found.append(Fact("Copies", titles.percent(shown.metrics["copies"]), words, source))
    cost = shown.cost
    if cost is not None:
        words = f"for {titles.number(cost.images)} images, {titles.number(cost.images_per_second)} a second, "
        words += cost.machine
        found.append(Fact(f"Training {shown.name}", titles.duration(cost.seconds), words, paths.costs(shown.name)))
    return found


def _told_apart(runs: Sequence[RunRecord], best: RunRecord, key: str) -> str:
    """Say what the lowest may not be told apart from."""
    if best.intervals.get(key) is None:
        return " (without intervals: no ranking)" if len(runs) > 1 else ""
    others = [run for run in runs if run is not best and run.metrics.get(key) is not None]
    near = [run.name for run in others if overlap(run.intervals.get(key), best.intervals[key])]
    return f", not told apart from {', '.join(near)}" if near else ""


def _best(runs: Sequence[RunRecord]) -> tuple[str, RunRecord | None]:
    """Return the run of the lowest distance, in the first distance that most runs have; None without any."""
    values: dict[str, dict[str, float]] = {}
    for run in runs:
        for key, value in run.metrics.items():
            if value is not None and titles.is_distance(key):
                values.setdefault(key, {})[run.name] = value
    if not values:
        return "", None
    key = max(titles.in_order(values), key=lambda key: len(values[key]))
    lowest = min(values[key], key=lambda name: values[key][name])
    return key, next(run for run in runs if run.name == lowest)
