"""Statistics of trials over seeds."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from afm_pipe.study.results import TrialResult


class Spread(NamedTuple):
    """A metric over the seeds of a row and column."""

    key: str
    values: tuple[float, ...]
    """Values of the trials that have one."""
    trials: int
    diverged: int
    interval: tuple[float, float] | None
    """95 % interval of the measurement, if there is a single value."""

    @property
    def mean(self) -> float | None:
        """The mean of the values; None without values."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The lowest and the highest value; the interval of a single one."""
        return (min(self.values), max(self.values)) if len(self.values) > 1 else self.interval


def spread(trials: Sequence[TrialResult], key: str) -> Spread:
    """Return a metric over trials that differ only in their seed."""
    measured = [(value, trial.intervals.get(key)) for trial in trials if (value := trial.metrics.get(key)) is not None]
    return Spread(
        key,
        tuple(float(value) for value, _ in measured),
        len(trials),
        sum(trial.diverged is not None for trial in trials),
        measured[0][1] if len(measured) == 1 else None,
    )


def t_interval(values: Sequence[float], min_deviation: float = 0.0) -> tuple[float, float] | None:
    """Return the 95 % t-interval of a mean; None for a single value."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return None
    deviation = max(statistics.stdev(values), min_deviation)
    half = float(stdtrit(len(values) - 1, 0.975)) * deviation / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def divergence(not_finite: int | None, probes: Sequence[dict[str, Any]], key: str, collapsed: float) -> str | None:
    """Return why a trial diverged, or None if it did not.

    It diverged if a loss was not finite, if its class accuracy at the end is no more than `collapsed`, or if its
    distance `key` at the end exceeds that of its first probe, at a third of the updates, with disjoint intervals. A
    trial that is merely short has not diverged.
    """
    if not_finite is not None:
        return f"non-finite loss at update {not_finite}"
    accuracy = probes[-1]["metrics"].get("class_accuracy") if probes else None
    if accuracy is not None and accuracy <= collapsed:
        return f"collapsed: class accuracy {accuracy:.0%}"
    if len(probes) > 1 and probes[-1]["intervals"][key][0] > probes[0]["intervals"][key][1]:
        return "worse at three times the updates"
    return None
