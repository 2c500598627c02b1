"""The rules of the monitor: pure functions of curves and probes that return an alarm or None.

docs/monitor.md describes each rule and the origin of its threshold.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from afm_pipe.objectives.base import Objective, Role
from afm_pipe.params import Run
from afm_pipe.training.curves import Row

ROLES: tuple[Role, ...] = ("d_accuracy", "output_scale", "transport_distance")

REFERENCE = 3  # earlier probes, from whose mean a drop is measured

ProbeResult = dict[str, float]
"""A probe: update, epoch; kid, class_accuracy, variance, spread, each with its standard error (`kid_error`)."""


class Alarm(NamedTuple):
    """The finding of a rule."""

    kind: str
    text: str
    evidence: dict[str, float]


class MonitoredColumns(NamedTuple):
    """The columns of the curves that rules read, by role (see `objectives.base.Term`)."""

    adversarial_loss: tuple[str, ...]
    d_accuracy: str | None
    output_scale: str | None
    transport_distance: str | None
    scheduled: tuple[str, ...]
    """Loss weights, which an identity alarm shows as evidence."""

    @classmethod
    def of(cls, objective: type[Objective] | Objective) -> "MonitoredColumns":
        """Return the columns of an objective; a rule without its column never fires."""
        one = {role: next(iter(objective.with_role(role)), None) for role in ROLES}
        losses, scheduled = objective.with_role("adversarial_loss"), (term.name for term in objective.scheduled)
        return cls(tuple(losses), **one, scheduled=tuple(scheduled))


def alarms_of_rows(run: Run, monitored: MonitoredColumns, rows: Sequence[Row]) -> list[Alarm]:
    """Return the alarms of the rules that only read curves."""
    return [alarm for alarm in (divergence(run, monitored, rows), identity(run, monitored, rows)) if alarm is not None]


def alarms_of_probes(
    run: Run, monitored: MonitoredColumns, rows: Sequence[Row], probes: Sequence[ProbeResult]
) -> list[Alarm]:
    """Return the alarms of the rules that read probes, after a new probe."""
    alarms = (spread_lost(run, probes), stagnation(run, monitored, rows, probes), collapse(run, probes))
    return [alarm for alarm in alarms if alarm is not None]


def divergence(run: Run, monitored: MonitoredColumns, rows: Sequence[Row]) -> Alarm | None:
    """Return an alarm if losses are non-finite or explode, or samples are much larger than data."""
    limits = run.monitor.divergence
    columns = (*monitored.adversarial_loss, *([monitored.output_scale] if monitored.output_scale else []))
    means = _means(run, rows, *columns)
    if not means:
        return None
    loss = max((means[name] for name in monitored.adversarial_loss), default=0.0)
    scale = means.get(monitored.output_scale or "", 0.0)
    if not all(map(math.isfinite, means.values())):
        return Alarm("divergence", "losses are not finite", means)
    if not _settled(run, rows[-1]):
        return None
    if loss > limits.loss:
        return Alarm("divergence", f"an adversarial loss of {loss:.3g}, above {limits.loss:g}", means)
    if scale > limits.output_scale:
        return Alarm("divergence", f"samples {scale:.3g} times as large as data, above {limits.output_scale:g}", means)
    return None


def spread_lost(run: Run, probes: Sequence[ProbeResult]) -> Alarm | None:
    """Return an alarm if samples hardly vary, over all classes."""
    last, limit = probes[-1], run.monitor.divergence.spread
    if _settled(run, last) and _below(run, last, "spread", limit):
        text = f"samples vary {_figure(last, 'spread')} times as much as data, below {limit:g}"
        return Alarm("divergence", text, _evidence(last, "spread"))
    return None


def identity(run: Run, monitored: MonitoredColumns, rows: Sequence[Row]) -> Alarm | None:
    """Return an alarm if G is close to the identity."""
    if monitored.transport_distance is None:
        return None
    means = _means(run, rows, monitored.transport_distance)
    if means is None or not _settled(run, rows[-1]):
        return None
    steps = 3 if run.nfe == "any" else run.nfe  # the rms of s - t over pairs of times is a third
    distance = means[monitored.transport_distance] * steps
    if distance < run.monitor.identity.transport_rms:
        text = f"G moves its noise by an rms of {distance:.3g}, below {run.monitor.identity.transport_rms:g}"
        return Alarm(
            "identity", text, {"transport_rms": distance} | {name: rows[-1][name] for name in monitored.scheduled}
        )
    return None


def stagnation(
    run: Run, monitored: MonitoredColumns, rows: Sequence[Row], probes: Sequence[ProbeResult]
) -> Alarm | None:
    """Return an alarm if quality stops improving while D wins."""
    limits = run.monitor.stagnation
    if monitored.d_accuracy is None or not stopped_improving(run, probes):
        return None
    since = probes[-limits.probes]["update"]
    wins = [row[monitored.d_accuracy] for row in rows if row["update"] > since]
    accuracy = sum(wins) / len(wins)
    if accuracy <= limits.d_accuracy:
        return None
    found = trend(run, probes)
    text = f"no better for {limits.probes} probes ({found}), while D is right in {accuracy:.1%} of pairs"
    return Alarm("stagnation", text, {"d_accuracy": accuracy, **_evidence(probes[-1], "kid"), **found._asdict()})


def collapse(run: Run, probes: Sequence[ProbeResult]) -> Alarm | None:
    """Return an alarm if, at several consecutive probes, samples within classes or across classes are too similar."""
    limits = run.monitor.collapse
    last, before = probes[-limits.probes :], probes[: -limits.probes]
    if len(last) < limits.probes or not _settled(run, last[0]):
        return None
    for name, limit, text in (
        ("variance", limits.variance, "samples of a class vary {} times as much as data"),
        ("class_accuracy", limits.class_accuracy, "samples are classified right {} times as often as data"),
    ):
        if all(_below(run, probe, name, limit) for probe in last):
            finding = text.format(_figure(last[-1], name))
            return Alarm("collapse", f"{finding}, below {limit:g}", _evidence(last[-1], name))
        usual = [probe for probe in before if _settled(run, probe)][-REFERENCE:]
        if len(usual) < REFERENCE:
            continue
        mean, error = _mean(usual, name)
        if all(_below(run, probe, name, (1 - limits.drop) * mean, error) for probe in last):
            finding = text.format(_figure(last[-1], name))
            evidence = {**_evidence(last[-1], name), f"{name}_before": mean, f"{name}_before_error": error}
            return Alarm("collapse", f"{finding}, {limits.drop:.0%} below {mean:.3g} before", evidence)
    return None


class Trend(NamedTuple):
    """Change of the distance from probe to probe over the last probes, as a fraction of their mean."""

    slope: float
    slope_error: float

    def __str__(self) -> str:
        return f"{self.slope:+.1%} ± {self.slope_error:.1%} a probe"


def trend(run: Run, probes: Sequence[ProbeResult]) -> Trend:
    """Return the least-squares trend of the last `stagnation.probes` probes.

    Its error comes from the errors of the probes, or from their scatter around the line if that is larger, since
    training itself is noisy.
    """
    last = probes[-run.monitor.stagnation.probes :]
    values, errors = [probe["kid"] for probe in last], [probe["kid_error"] for probe in last]
    count, mean = len(values), sum(values) / len(values)
    places = [index - (count - 1) / 2 for index in range(count)]
    square = sum(place**2 for place in places)
    slope = sum(place * value for place, value in zip(places, values, strict=True)) / square
    propagated = math.sqrt(sum((place * error) ** 2 for place, error in zip(places, errors, strict=True))) / square
    residuals = [value - mean - slope * place for place, value in zip(places, values, strict=True)]
    scatter = math.sqrt(sum(residual**2 for residual in residuals) / (count - 2) / square)
    scale = max(abs(mean), *errors)  # near zero the distance may be negative
    return Trend(slope / scale, max(propagated, scatter) / scale)


def stopped_improving(run: Run, probes: Sequence[ProbeResult], since: int = 0) -> bool:
    """Return whether the last probes, all after update `since`, improve significantly less than expected."""
    limits = run.monitor.stagnation
    last = probes[-limits.probes :]
    if len(last) < limits.probes or not _settled(run, last[0]) or last[0]["update"] <= since:
        return False
    found = trend(run, probes)
    return found.slope - run.monitor.significance * found.slope_error > -limits.improvement


def _below(run: Run, probe: ProbeResult, name: str, limit: float, limit_error: float = 0.0) -> bool:
    """Return whether a value of a probe is significantly below a limit."""
    error = math.hypot(probe[f"{name}_error"], limit_error)
    return probe[name] + run.monitor.significance * error < limit


def _mean(probes: Sequence[ProbeResult], name: str) -> tuple[float, float]:
    """Return the mean of a value over probes, and its standard error."""
    values, errors = [probe[name] for probe in probes], [probe[f"{name}_error"] for probe in probes]
    mean = sum(values) / len(values)
    scatter = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return mean, max(scatter, math.sqrt(sum(error**2 for error in errors)) / len(errors))


def _figure(probe: ProbeResult, name: str) -> str:
    return f"{probe[name]:.3g} ± {probe[f'{name}_error']:.1g}"


def _evidence(probe: ProbeResult, name: str) -> dict[str, float]:
    return {name: probe[name], f"{name}_error": probe[f"{name}_error"]}


def _settled(run: Run, at: Row) -> bool:
    return at["epoch"] >= run.monitor.settle_epochs


def _means(run: Run, rows: Sequence[Row], *names: str) -> dict[str, float] | None:
    """Return the means of columns over the last rows; None if there are too few rows."""
    last = rows[-run.monitor.rows :]
    if len(last) < run.monitor.rows:
        return None
    return {name: sum(row[name] for row in last) / len(last) for name in names}
