"""The rules of the monitor: each looks at what is known of a run and returns an alarm, or nothing.

Pure functions of rows of the curves and of probes. docs/monitor.md states each rule and where its threshold comes
from.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from afm_pipe.objectives.base import Objective, Role
from afm_pipe.params import Run
from afm_pipe.training.curves import Row

ROLES: tuple[Role, ...] = ("d_accuracy", "output_scale", "transport_distance")

Probed = dict[str, float]  # update, epoch, kid, class_accuracy, variance, spread


class Alarm(NamedTuple):
    """What a rule found."""

    kind: str
    text: str
    evidence: dict[str, float]


class Watched(NamedTuple):
    """The columns of the curves that rules look at, by role (`objectives.base.Term`)."""

    adversarial_loss: tuple[str, ...]
    d_accuracy: str | None
    output_scale: str | None
    transport_distance: str | None

    @classmethod
    def of(cls, objective: type[Objective] | Objective) -> "Watched":
        """Return the columns of an objective; a rule without its column never fires."""
        one = {role: next(iter(objective.with_role(role)), None) for role in ROLES}
        return cls(tuple(objective.with_role("adversarial_loss")), **one)


def alarms_of_rows(run: Run, watched: Watched, rows: Sequence[Row]) -> list[Alarm]:
    """Return the alarms of the rules that need the curves alone."""
    return [alarm for alarm in (divergence(run, watched, rows), identity(run, watched, rows)) if alarm is not None]


def alarms_of_probes(run: Run, watched: Watched, rows: Sequence[Row], probes: Sequence[Probed]) -> list[Alarm]:
    """Return the alarms of the rules that need a probe, right after one."""
    found = (spread_lost(run, probes), stagnation(run, watched, rows, probes), collapse(run, probes))
    return [alarm for alarm in found if alarm is not None]


def divergence(run: Run, watched: Watched, rows: Sequence[Row]) -> Alarm | None:
    """Losses are not finite or explode, or samples are much larger than data."""
    limits = run.monitor.divergence
    columns = (*watched.adversarial_loss, *([watched.output_scale] if watched.output_scale else []))
    seen = _means(run, rows, *columns)
    if not seen:
        return None
    loss = max((seen[name] for name in watched.adversarial_loss), default=0.0)
    scale = seen.get(watched.output_scale or "", 0.0)
    if not all(map(math.isfinite, seen.values())):
        return Alarm("divergence", "losses are not finite", seen)
    if not _settled(run, rows[-1]):
        return None
    if loss > limits.loss:
        return Alarm("divergence", f"an adversarial loss of {loss:.3g}, above {limits.loss:g}", seen)
    if scale > limits.output_scale:
        return Alarm("divergence", f"samples {scale:.3g} times as large as data, above {limits.output_scale:g}", seen)
    return None


def spread_lost(run: Run, probes: Sequence[Probed]) -> Alarm | None:
    """Samples vary hardly at all, over all classes."""
    last, limit = probes[-1], run.monitor.divergence.spread
    if _settled(run, last) and last["spread"] < limit:
        text = f"samples vary {last['spread']:.3g} times as much as data, below {limit:g}"
        return Alarm("divergence", text, {"spread": last["spread"]})
    return None


def identity(run: Run, watched: Watched, rows: Sequence[Row]) -> Alarm | None:
    """G returns nearly what it is given."""
    if watched.transport_distance is None:
        return None
    seen = _means(run, rows, watched.transport_distance)
    if seen is None or not _settled(run, rows[-1]):
        return None
    steps = 3 if run.nfe == "any" else run.nfe  # the root mean square of s - t over pairs of times is a third
    move = seen[watched.transport_distance] * steps
    if move < run.monitor.identity.transport_rms:
        text = f"G moves its noise by {move:.3g} of its size, below {run.monitor.identity.transport_rms:g}"
        return Alarm("identity", text, {"transport_rms": move, "transport": rows[-1]["transport"]})
    return None


def stagnation(run: Run, watched: Watched, rows: Sequence[Row], probes: Sequence[Probed]) -> Alarm | None:
    """Quality stops improving while D wins."""
    limits = run.monitor.stagnation
    if watched.d_accuracy is None or not stopped_improving(run, probes):
        return None
    since = probes[-limits.probes - 1]["update"]
    wins = [row[watched.d_accuracy] for row in rows if row["update"] > since]
    accuracy = sum(wins) / len(wins)
    if accuracy <= limits.d_accuracy:
        return None
    best = min(probe["kid"] for probe in probes)
    text = f"no better for {limits.probes} probes, while D tells {accuracy:.1%} of pairs apart"
    return Alarm("stagnation", text, {"d_accuracy": accuracy, "kid": probes[-1]["kid"], "best_kid": best})


def collapse(run: Run, probes: Sequence[Probed]) -> Alarm | None:
    """Samples of a class are too much alike, or those of different classes are; at several probes in a row."""
    limits = run.monitor.collapse
    last = probes[-limits.probes :]
    if len(last) < limits.probes or not _settled(run, last[0]):
        return None
    seen = {name: max(probe[name] for probe in last) for name in ("variance", "class_accuracy")}
    if seen["variance"] < limits.variance:
        text = f"samples of a class vary {seen['variance']:.3g} times as much as data, below {limits.variance:g}"
        return Alarm("collapse", text, seen)
    if seen["class_accuracy"] < limits.class_accuracy:
        share = f"{seen['class_accuracy']:.3g} times as often as data, below {limits.class_accuracy:g}"
        return Alarm("collapse", f"samples look like the class asked for {share}", seen)
    return None


def stopped_improving(run: Run, probes: Sequence[Probed], since: int = 0) -> bool:
    """Tell whether none of the last probes is clearly better than the best before them; all taken after `since`."""
    limits = run.monitor.stagnation
    before, last = probes[: -limits.probes], probes[-limits.probes :]
    if not before or not _settled(run, before[-1]) or last[0]["update"] <= since:
        return False
    best = min(probe["kid"] for probe in before)
    return min(probe["kid"] for probe in last) > best - limits.improvement * abs(best)


def _settled(run: Run, at: Row) -> bool:
    return at["epoch"] >= run.monitor.settle_epochs


def _means(run: Run, rows: Sequence[Row], *names: str) -> dict[str, float] | None:
    """Return the means of some columns over the last rows, None while there are too few."""
    last = rows[-run.monitor.rows :]
    if len(last) < run.monitor.rows:
        return None
    return {name: sum(row[name] for row in last) / len(last) for name in names}
