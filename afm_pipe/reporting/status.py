"""The state of every run, read from files only: without torch, without a lock, and without writing anything.

work/RUN holds the lease of the process that trains the run and, in a folder named by its identity, curves, events and
checkpoints. Any file may be partial, damaged, or of other params; an unreadable file counts as absent.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from afm_pipe.data.latents_format import provenance_fingerprint, read_provenance
from afm_pipe.objectives.schedules import num_updates, phase_at
from afm_pipe.params import Params, Run
from afm_pipe.params.versions import code_notice, origin_files, run_identity
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import json_value, sha256_file
from afm_pipe.runtime.lease import holder_of
from afm_pipe.training.curves import Row, scan_curves
from afm_pipe.training.events import FATAL, FILE, Event, scan_events

MAX_NUMBER = 1e300
ACTIONS = ("phase", "stop")  # kinds of events that are not alarms


@dataclass(frozen=True)
class RunStatus:
    """The state of a run."""

    name: str
    run: Run
    state: Literal["not begun", "waiting", "training", "stopped", "failed", "finished", "outdated"] = "not begun"
    note: str = ""
    """More about the state, in a few words."""
    rows: list[Row] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    damaged: int = 0
    """Unreadable lines of curves and events."""
    update: int = 0
    total: int | None = None
    num_images: int | None = None
    seconds_left: float | None = None

    @property
    def alarms(self) -> list[Event]:
        """Events that are alarms of the monitor."""
        return [event for event in self.events if event.kind not in ACTIONS]

    @property
    def phase(self) -> str:
        """Number of the current phase, and of all phases if their number is fixed."""
        begun = sum(event.kind == "phase" for event in self.events)
        if begun:  # of an automatic schedule
            return str(begun + 1)
        if self.num_images is None or not self.update:
            return "-"
        number = 1 + self.run.phases.index(phase_at(self.run, self.update, self.num_images))
        return f"{number} of {len(self.run.phases)}"

    @property
    def health(self) -> str:
        """The last alarm, "ok" or "not monitored"; a dash before there is anything to judge."""
        if self.state == "failed":
            return "failed"
        if self.alarms:
            return f"{self.alarms[-1].kind} at {self.alarms[-1].update:,}"
        if self.run.monitor.policy == "off":
            return "not monitored"
        return "ok" if self.rows or self.state == "finished" else "-"

    @property
    def last_row(self) -> Row | None:
        """The last row of the curves whose values are all finite."""
        return next((row for row in reversed(self.rows) if all(map(math.isfinite, row.values()))), None)


def all_statuses(params: Params) -> list[RunStatus]:
    """Return the status of every run in params, in their order."""
    known: dict[str, RunStatus] = {}
    for name in params.models:
        known[name] = run_status(params, name, known)
    return list(known.values())


def run_status(params: Params, name: str, known: dict[str, RunStatus] | None = None) -> RunStatus:
    """Return the status of a run. Raises UserError for a name that is not in params.

    `known` holds statuses that are already read, such as that of the run it continues.
    """
    run, base = params.model(name), params.guided[name].base if name in params.guided else None
    num_images, identity = None, None
    try:
        provenance = read_provenance(paths.LATENTS)
        num_images = int(provenance["image_count"])
        identity = _identity(params, name, provenance)
    except (UserError, KeyError, ValueError, OSError):
        pass  # no latents yet, or no base yet
    total = num_updates(run, num_images) if num_images else None
    config = paths.model(name) / "config.json"
    made, made_updates = json_value(config, "provenance", "fingerprint"), json_value(config, "updates")
    work = _work_dir(paths.WORK / name, identity)
    rows, damaged_rows = scan_curves(_existing(work and work / "curves.csv", paths.curves(name)))
    events, damaged_events = scan_events(_existing(work and work / FILE, paths.events(name)))
    status = RunStatus(
        name,
        run,
        rows=rows,
        events=[_printable(event) for event in events],
        damaged=len(damaged_rows) + len(damaged_events),
        update=int(rows[-1]["update"]) if rows else 0,
        total=total,
        num_images=num_images,
    )
    if holder := holder_of(paths.WORK / name):
        begun = None if base is None or params.guided[name].begins_anew else base
        left = _seconds_left(work, status, begun)
        return replace(status, state="training", note=f"by {holder}", seconds_left=left)
    if work is not None and events and _is_end(events[-1]) and (made is None or made != identity):
        return replace(status, state="failed", note=status.events[-1].text)
    if made is not None and made == identity:
        done = made_updates if isinstance(made_updates, int) else None
        return replace(status, state="finished", update=done or status.update, total=done or total)
    if work is not None and rows:
        return replace(status, state="stopped", note="the same command resumes it")
    if made is not None and identity is not None:
        return replace(status, state="outdated", note="trained with other params, data or code")
    if made is not None:
        return replace(status, state="finished", note="not compared with params: there are no latents")
    status = RunStatus(
        name, run, total=total, num_images=num_images
    )  # curves without a work folder come from another machine
    if num_images is None:
        unreadable = ", which cannot be read" if paths.LATENTS.exists() else ""
        return replace(status, state="waiting", note=f"for {paths.LATENTS}{unreadable}")
    if base in params.imported and not (paths.model(base) / "config.json").is_file():
        return replace(status, state="waiting", note=f"for {base}, which is not imported")
    if base in params.runs:
        state = ((known or {}).get(base) or run_status(params, base)).state
        if state != "finished":
            return replace(status, state="waiting", note=f"for {base}, which is {state}")
    return status


def trials_line(params: Params) -> str | None:
    """Say how many trials of the tables are measured; None if params have no tables."""
    if not params.tables:
        return None
    from afm_pipe.study.trials import Trials

    what = f"trials of {len(params.tables)} table{'s' * (len(params.tables) != 1)}"
    try:
        trials = Trials(params).all
    except UserError as error:
        return f"{what}: unknown ({str(error).split(':')[0]})"
    missing = [trial for trial in trials if not trial.result.is_file()]
    started = sum((trial.folder / "curves.csv").is_file() for trial in missing)
    return f"{what}: {len(trials) - len(missing)} of {len(trials)} measured" + f", {started} started" * bool(started)


def code_line(params: Params) -> str | None:
    """Return a line on results of source code that differs from today's under an equal version, if any."""
    return code_notice(_recorded_code(params))


def _recorded_code(params: Params) -> Iterator[tuple[str, Any]]:
    """Yield the names of results with the code they record."""
    for name in params.names:
        config, costs, metrics = paths.model(name) / "config.json", paths.costs(name), paths.metrics(name)
        if name in params.models and json_value(config):
            yield name, json_value(config, "provenance", "code")
        elif name in params.models and json_value(costs):
            yield name, json_value(costs, "code")
        if json_value(metrics):
            yield name, json_value(metrics, "protocol", "code")
    for name in params.tables:
        for path in (paths.table(name), paths.STUDY / f"{name}.json"):
            trials = json_value(path, "trials")
            for trial in trials if isinstance(trials, list) else ():
                yield f"table {name}", trial.get("code") if isinstance(trial, dict) else None


def _is_end(event: Event) -> bool:
    """Return whether an event ended its run: a non-finite loss that no rollback followed."""
    not_finite = event.kind == "not_finite" or "finite" in event.text
    return event.kind in FATAL and not_finite and "rolled_back_to" not in event.evidence


def _printable(event: Event) -> Event:
    """Return an event whose texts cannot control a terminal and whose evidence can be formatted."""

    def clean(text: str) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:1000]

    evidence = {clean(key): value for key, value in event.evidence.items() if abs(value or 0) < MAX_NUMBER}
    action = None if event.action is None else clean(event.action)
    return replace(event, kind=clean(event.kind), text=clean(event.text), evidence=evidence, action=action)


def by_age(files: Iterable[Path]) -> list[tuple[float, Path]]:
    """Return the times at which files last changed, and the files, the newest last; not those removed meanwhile."""
    found = []
    for path in files:
        with suppress(OSError):
            found.append((path.stat().st_mtime, path))
    return sorted(found)


def _identity(params: Params, name: str, provenance: dict[str, str]) -> str:
    """Return the identity of a run trained with the current params and inputs."""
    origins = {part: sha256_file(file) for part, file in origin_files(params, name).items()}
    return run_identity(params.models[name], params.latent_shape, provenance_fingerprint(provenance), origins)


def _work_dir(folder: Path, identity: str | None) -> Path | None:
    """Return the folder of a run's identity, if it exists; if the identity is unknown, that with the newest curves."""
    if identity is not None:
        return folder / identity if (folder / identity).is_dir() else None
    found = by_age(folder.glob("*/curves.csv"))
    return found[-1][1].parent if found else None


def _seconds_left(work: Path | None, status: RunStatus, base: str | None) -> float | None:
    """Return the remaining time at the average speed so far, which the newest checkpoint records."""
    if work is None or status.total is None:
        return None
    start = json_value(paths.model(base) / "config.json", "updates") if base else 0
    for checkpoint in sorted(work.glob("checkpoints/update-*"), reverse=True):
        manifest = checkpoint / "manifest.json"
        update, seconds = json_value(manifest, "update"), json_value(manifest, "seconds", "training")
        done = update - start if isinstance(update, int) and isinstance(start, int) else 0
        if done > 0 and isinstance(seconds, int | float) and abs(seconds) < MAX_NUMBER:
            return max(status.total - status.update, 0) * seconds / done
    return None


def _existing(first: Path | None, second: Path) -> Path:
    return first if first is not None and first.is_file() else second
