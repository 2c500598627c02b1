"""The facts of the summary: distance, class accuracy, copies and cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Inputs, RunRecord
from afm_pipe.reporting.ranking import overlap
from afm_pipe.runtime import paths


class Fact(NamedTuple):
    """A number of the summary, the words below it, and its file."""

    title: str
    value: str
    words: str
    source: Path


def facts(inputs: Inputs) -> list[Fact]:
    """Return the facts of the summary."""
    found = []
    key, best = _best(inputs.runs)
    if best is not None:
        floor = inputs.summary.floor(titles.base_key(key))
        words = f"{titles.metric(key).title}, run {best.name}, the lowest" + _rivals(inputs.runs, best, key)
        words += f"; reconstructed real images have {titles.number(floor)}" if floor is not None else ""
        found.append(Fact("Best distance", titles.metric_text(key, best.metrics[key]), words, paths.metrics(best.name)))
        relative = f"ratio_{titles.base_key(key)}"
        ratio = next((each for each in titles.in_order(best.metrics) if titles.base_key(each) == relative), None)
        if ratio is not None:
            words = f"{titles.metric(ratio).title}, run {best.name}: 1 is real"
            if (ends := best.intervals.get(ratio)) is not None:
                words += f"; 95 % interval {' to '.join(titles.metric_text(ratio, end) for end in ends)}"
            value = titles.metric_text(ratio, best.metrics[ratio])
            found.append(Fact("Distance ratio", value, words, paths.metrics(best.name)))
    shown = best or inputs.runs[0]
    source = paths.metrics(shown.name)
    if shown.metrics.get("class_accuracy") is not None:
        words = f"of {shown.name}'s samples show their class"
        accuracy = inputs.summary.classifier_accuracy
        words += f"; the classifier is right on {titles.percent(accuracy)} of held-out real images" if accuracy else ""
        found.append(Fact("Class accuracy", titles.percent(shown.metrics["class_accuracy"]), words, source))
    if shown.metrics.get("copies") is not None:
        words = f"of {shown.name}'s samples are nearly a training image; new real images would give about 0.1 %"
        found.append(Fact("Copies", titles.percent(shown.metrics["copies"]), words, source))
    if shown.cost is not None:
        images, rate = titles.number(shown.cost.images), titles.number(shown.cost.images_per_second)
        words = f"for {images} images, {rate} a second, {shown.cost.machine}"
        time = titles.duration(shown.cost.seconds)
        found.append(Fact(f"Training {shown.name}", time, words, paths.costs(shown.name)))
    return found


def _rivals(runs: Sequence[RunRecord], best: RunRecord, key: str) -> str:
    """Name the runs that are indistinguishable from the lowest."""
    if best.intervals.get(key) is None:
        return " (without intervals: no ranking)" if len(runs) > 1 else ""
    others = [run for run in runs if run is not best and run.metrics.get(key) is not None]
    near = [run.name for run in others if overlap(run.intervals.get(key), best.intervals[key])]
    return f", indistinguishable from {', '.join(near)}" if near else ""


def _best(runs: Sequence[RunRecord]) -> tuple[str, RunRecord | None]:
    """Return the run with the lowest distance, in the first distance that most runs have; None without any."""
    values = {
        key: {run.name: value for run in runs if (value := run.metrics.get(key)) is not None}
        for key in titles.in_order(key for run in runs for key in run.metrics if titles.is_distance(key))
    }
    key = max(values, key=lambda key: len(values[key]), default="")
    found = [run for run in runs if run.name in values.get(key, ())]
    return key, min(found, key=lambda run: values[key][run.name], default=None)
