"""The event log of a run, with one JSON object per line: update, images, kind, text, evidence, action.

Every checkpoint contains the log, from which the file is rewritten when a run resumes, so that it equals that of an
uninterrupted run.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from afm_pipe.runtime.files import atomic_path, complete_lines, try_append

FILE = "events.jsonl"  # in the folder of a run
FATAL = ("divergence", "not_finite")  # kinds that end a run unless it rolls back
ALARMS = ("identity", "divergence", "stagnation", "collapse")  # kinds that rules raise; other kinds are actions


@dataclass(frozen=True)
class Event:
    """An alarm of a rule, or an action of the monitor."""

    update: int
    images: int  # seen by G
    kind: str
    text: str
    evidence: dict[str, float | int | None] = field(default_factory=dict)
    action: str | None = None  # what the monitor did, if anything


_EVENT = TypeAdapter(Event)


def write_events(path: Path, events: Sequence[Event]) -> None:
    """Write the log, atomically."""
    with atomic_path(path) as temp:
        temp.write_text("".join(_line(event) for event in events), encoding="utf-8")


def append_event(path: Path, event: Event) -> None:
    """Append an event to a log.

    A full disk is ignored: the monitor keeps all events, and rewrites the log at every start and at the end.
    """
    try_append(path, _line(event))


def scan_events(path: Path) -> tuple[list[Event], list[int]]:
    """Read a log that may be missing, growing or damaged; return its events and the numbers of damaged lines."""
    events, damaged = [], []
    for number, line in enumerate(complete_lines(path), 1):
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError:
            damaged.append(number)
    return events, damaged


def _line(event: Event) -> str:
    return json.dumps(asdict(event)) + "\n"
