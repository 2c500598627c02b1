"""What a person sees while a stage works: a live bar on a terminal, a plain line every few seconds elsewhere.

Library functions that take long are generators of `Progress`; `track` drives one, renders it and returns its result.
"""

import sys
import time
from collections.abc import Generator
from typing import NamedTuple, TypeVar

from afm_pipe.runtime.environment import env_rank

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 5.0


class Progress(NamedTuple):
    """Progress of one piece of work: `done` of `total` `unit`s, and a few figures worth showing."""

    done: int
    total: int
    unit: str
    facts: str = ""


def track(title: str, ticks: Generator[Progress, None, T]) -> T:
    """Drive a generator of ticks to its end, showing progress and time left; return what it returns."""
    if env_rank() > 0:
        return finish(ticks)
    return (_live if sys.stderr.isatty() else _plain)(title, ticks)


def finish(ticks: Generator[Progress, None, T]) -> T:
    """Drive a generator to its end silently; return what it returns."""
    while True:
        try:
            next(ticks)
        except StopIteration as end:
            return end.value


def _live(title: str, ticks: Generator[Progress, None, T]) -> T:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[facts]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, unit="", facts="")
        while True:
            try:
                tick = next(ticks)
            except StopIteration as end:
                return end.value
            progress.update(task, completed=tick.done, total=tick.total, unit=tick.unit, facts=tick.facts)


def _plain(title: str, ticks: Generator[Progress, None, T]) -> T:
    started = last = time.monotonic()
    first_done = None
    while True:
        try:
            tick = next(ticks)
        except StopIteration as end:
            return end.value
        now = time.monotonic()
        first_done = tick.done if first_done is None else first_done
        if now - last < SECONDS_BETWEEN_LINES and tick.done < tick.total:
            continue
        last = now
        rate = (tick.done - first_done) / max(now - started, 1e-9)  # since the start or the resume
        left = f"ETA {(tick.total - tick.done) / rate:.0f} s" if rate > 0 else "ETA unknown"
        print(
            f"{title}: {tick.done}/{tick.total} {tick.unit}, {left}  {tick.facts}".rstrip(), file=sys.stderr, flush=True
        )
