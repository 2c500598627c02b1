"""How runs stand, read from their files alone: no torch, no lock taken, nothing written, damaged logs and all.

A run's work lies under work/RUN/FINGERPRINT: curves.csv, events.jsonl, checkpoints with manifests; who holds it, in
work/RUN. What is found there may be half written, of other params, or nonsense; what cannot be read counts as absent.
"""

import csv
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from afm_pipe.data.latents_format import provenance_fingerprint, read_provenance
from afm_pipe.objectives.schedules import num_updates, update_at
from afm_pipe.params import Params, Run
from afm_pipe.params.versions import run_identity
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_text, sha256_file
from afm_pipe.training.events import FATAL

LARGEST_LOG, LARGEST_SMALL = 1 << 28, 1 << 24  # bytes; a run has at most some thousand rows
FRESH = 30.0  # seconds after its last touch in which a lease counts as held
ACTIONS = ("phase", "stop")  # kinds of events that are no alarms
Row = dict[str, float]


class Event(NamedTuple):
    """A line of a run's log of events."""

    update: int
    kind: str
    text: str
    evidence: dict[str, float | None]
    action: str | None


@dataclass(frozen=True)
class Standing:
    """How a run stands. `state` is one of not begun, waiting, training, stopped, failed, finished, outdated."""

    name: str
    run: Run
    state: str
    why: str = ""
    """More about the state, in a few words."""
    holder: str | None = None
    rows: list[Row] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    unread: int = 0
    """Lines of logs that could not be read."""
    update: int = 0
    total: int | None = None
    num_images: int | None = None
    seconds_left: float | None = None

    @property
    def alarms(self) -> list[Event]:
        """What the watch found wrong."""
        return [event for event in self.events if event.kind not in ACTIONS]

    @property
    def phase(self) -> str:
        """Which phase the run is in, of how many."""
        begun = [event for event in self.events if event.kind == "phase"]
        if begun:  # of a schedule that decides by itself
            return str(len(begun) + 1)
        if self.num_images is None or not self.update:
            return "-"
        ends = [update_at(self.run, phase.until_epoch, self.num_images) for phase in self.run.phases]
        return f"{min(1 + sum(self.update >= end for end in ends), len(ends))} of {len(ends)}"

    @property
    def health(self) -> str:
        """What the last alarm was, ok, or not watched; a dash where there is nothing to judge by."""
        if self.state == "failed":
            return "failed"
        if self.alarms:
            return f"{self.alarms[-1].kind} at {self.alarms[-1].update:,}"
        if self.run.monitor.policy == "off":
            return "not watched"
        return "ok" if self.rows or self.state == "finished" else "-"


def standings(params: Params) -> list[Standing]:
    """Return how each run of params stands, in their order."""
    known: dict[str, Standing] = {}
    for name in params.models:
        known[name] = standing(params, name, known)
    return list(known.values())


def standing(params: Params, name: str, known: dict[str, Standing] | None = None) -> Standing:
    """Return how a run stands. Raises UserError for a name that params do not have."""
    if name not in params.models:
        raise UserError(f"Found no run {name!r} in params, expected one of {', '.join(params.models)}.")
    run, base = params.models[name], params.guided[name].base if name in params.guided else None
    folder, holder = paths.WORK / name, holder_of(paths.WORK / name)
    num_images: int | None = None
    identity: str | None = None
    try:
        provenance = read_provenance(paths.LATENTS)
        num_images = int(provenance["image_count"])
        identity = _identity(params, name, run, provenance)
    except (UserError, KeyError, ValueError, OSError):
        pass  # no latents yet, or not yet what the run continues
    total = None if not num_images else num_updates(run, num_images)
    described = _json(paths.model(name) / "config.json")
    made = _at(described, "provenance", "fingerprint")
    work = _work(folder, identity)
    rows, unread_rows = read_rows(_first(work and work / "curves.csv", paths.curves(name)))
    log = _first(work and work / "events.jsonl", paths.events(name))
    events, unread_events = read_events(log)
    update = int(rows[-1]["update"]) if rows else 0
    facts: dict[str, Any] = {
        "rows": rows,
        "events": events,
        "unread": unread_rows + unread_events,
        "update": update,
        "total": total,
        "num_images": num_images,
        "holder": holder,
    }
    begun = _begins_at(params, base)
    if holder is not None:
        left = _seconds_left(work, update, total, begun)
        return Standing(name, run, "training", f"by {holder}", seconds_left=left, **facts)
    broke = bool(events) and _ended(events[-1])
    if broke and work is not None and (made is None or made != identity):
        return Standing(name, run, "failed", events[-1].text, **facts)
    if made is not None and made == identity:
        done = _at(described, "updates")
        facts |= {
            "update": done if isinstance(done, int) else update,
            "total": done if isinstance(done, int) else total,
        }
        return Standing(name, run, "finished", "", **facts)
    if work is not None and rows:
        return Standing(name, run, "stopped", "the same command goes on", **facts)
    if made is not None and identity is not None:
        return Standing(name, run, "outdated", "trained with other params, data or code", **facts)
    if made is not None:
        return Standing(name, run, "finished", "without latents here to compare it with", **facts)
    facts |= {"rows": [], "events": [], "unread": 0, "update": 0}  # those in place are of a training elsewhere
    if num_images is None:
        return Standing(name, run, "waiting", f"for {paths.LATENTS}", **facts)
    if base is not None:
        of_base = (known or {}).get(base) or standing(params, base)
        if of_base.state != "finished":
            return Standing(name, run, "waiting", f"for {base}, which is {of_base.state}", **facts)
    return Standing(name, run, "not begun", "", **facts)


def _ended(event: Event) -> bool:
    """Tell whether a training ended by an event: a loss that was no number, after which it did not go back."""
    no_number = event.kind == "not_finite" or "not finite" in event.text
    return event.kind in FATAL and no_number and "rolled_back_to" not in event.evidence


def cells_line(params: Params) -> str | None:
    """Return how many cells of the tables are measured, or None where params have no tables."""
    if not params.tables:
        return None
    from afm_pipe.study.trials import Trials

    try:
        jobs = Trials(params, []).all
    except UserError as error:
        return f"cells of {len(params.tables)} tables: not known yet ({str(error).split(':')[0]})"
    done = sum(job.result.is_file() for job in jobs)
    begun = sum((job.folder / "curves.csv").is_file() for job in jobs if not job.result.is_file())
    return f"cells of {len(params.tables)} tables: {done} of {len(jobs)} measured" + (f", {begun} begun" * (begun > 0))


def holder_of(folder: Path) -> str | None:
    """Return who holds a folder of work, if somebody does; without touching its lock, which a trainer may want now."""
    leases = sorted(folder.glob("lease-*")) if folder.is_dir() else []
    if leases:
        content = _json(leases[-1])
        try:
            fresh = time.time() - leases[-1].stat().st_mtime < FRESH
        except OSError:
            return None  # let go this moment
        pid, host = _at(content, "pid"), _at(content, "host")
        if not fresh or (host == socket.gethostname() and isinstance(pid, int) and not _runs(pid)):
            return None
        return f"process {pid} on {host}"
    try:
        words = read_text(folder / "lock", LARGEST_SMALL).split()
    except (OSError, UserError, UnicodeDecodeError):
        return None
    if len(words) == 4 and words[0] == "process" and words[1].isdecimal() and words[3] == socket.gethostname():
        return " ".join(words) if _runs(int(words[1])) and _locked(folder / "lock") else None
    return None


def read_rows(path: Path | None) -> tuple[list[Row], int]:
    """Return the rows of curves that can be read, and how many lines could not."""
    lines = _lines(path)
    if not lines:
        return [], 0
    header, rows, unread = next(csv.reader(lines[:1]), []), [], 0
    for line in lines[1:]:
        try:
            row = dict(zip(header, map(float, line.split(",")), strict=True))
            int(row["update"])
        except (ValueError, KeyError, OverflowError):
            unread += 1
            continue
        rows.append(row)
    return rows, unread


def read_events(path: Path | None) -> tuple[list[Event], int]:
    """Return the events that can be read, and how many lines could not; half a last line is being written."""
    events, unread = [], 0
    for line in _lines(path):
        try:
            raw = json.loads(line)
            evidence = {str(k): v for k, v in (raw.get("evidence") or {}).items() if v is None or _is_number(v)}
            action = raw.get("action")
            event = Event(raw["update"], raw["kind"], raw["text"], evidence, None if action is None else str(action))
            if not isinstance(event.update, int) or not isinstance(event.kind, str) or not isinstance(event.text, str):
                raise ValueError("another type")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            unread += 1
            continue
        events.append(event._replace(kind=printable(event.kind), text=printable(event.text)))
    return events, unread


def printable(text: str) -> str:
    """Return text without what could steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:1000]


def _identity(params: Params, name: str, run: Run, provenance: dict[str, str]) -> str:
    """Return the fingerprint that training a run would have now, as `afm_pipe.pipeline.training` makes it."""
    files = {}
    if name in params.guided:
        base = paths.model(params.guided[name].base)
        files = {part: base / f"{part}.safetensors" for part in ("generator", "discriminator")}
    if run.guided:
        files["classifier"] = paths.CLASSIFIER / "classifier.safetensors"
    latents = provenance_fingerprint(provenance)
    return run_identity(run, params.latent_shape, latents, {part: sha256_file(file) for part, file in files.items()})


def _work(folder: Path, identity: str | None) -> Path | None:
    """Return the work of a run as it is now; where that is not known, the newest there is."""
    if identity is not None:
        return folder / identity if (folder / identity).is_dir() else None
    found = [path.parent for path in folder.glob("*/curves.csv") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _begins_at(params: Params, base: str | None) -> int:
    updates = _at(_json(paths.model(base) / "config.json"), "updates") if base else 0
    return updates if isinstance(updates, int) else 0


def _seconds_left(work: Path | None, update: int, total: int | None, begun: int) -> float | None:
    """Return the time left at the pace so far, as the newest checkpoint knows it; before there is one, nothing."""
    if work is None or total is None:
        return None
    for checkpoint in sorted(work.glob("checkpoints/update-*"), reverse=True):
        manifest = _json(checkpoint / "manifest.json")
        then, seconds = _at(manifest, "update"), _at(manifest, "seconds", "training")
        if isinstance(then, int) and then > begun and _is_number(seconds):
            return max(total - update, 0) * seconds / (then - begun)
    return None


def _first(*places: Path | None) -> Path | None:
    return next((path for path in places if path is not None and path.is_file()), None)


def _lines(path: Path | None) -> list[str]:
    """Return the whole lines of a file that may be growing, damaged or missing."""
    if path is None:
        return []
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_LOG:
            return []
        text = path.read_bytes().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip("\r\n") for line in text.splitlines(keepends=True) if line.endswith("\n") and line.strip()]


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, LARGEST_SMALL))
    except (OSError, ValueError, RecursionError):  # a UserError is a ValueError
        return None


def _at(value: Any, *place: str) -> Any:
    for part in place:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _locked(path: Path) -> bool:
    """Tell whether a lock on a file is held, as Linux lists them; elsewhere that its holder runs must do."""
    try:
        listed = Path("/proc/locks").read_text().splitlines()
        inode = str(path.stat().st_ino)
    except OSError:
        return True
    return any(line.split()[1] == "FLOCK" and line.split()[5].split(":")[-1] == inode for line in listed)


def finite(rows: list[Row]) -> Iterator[Row]:
    """Yield the rows all of whose figures are numbers."""
    return (row for row in rows if all(map(math.isfinite, row.values())))
