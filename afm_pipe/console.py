"""What a person sees while a stage works: a live bar on a terminal, a plain line every few seconds elsewhere.

Library functions that take long are generators of `Tick`; `follow` drives one, renders it and returns its result.
"""

import functools
import sys
import time
from collections.abc import Callable, Generator, Sequence
from io import StringIO
from typing import NamedTuple, ParamSpec, TypeVar

from afm_pipe.errors import UserError
from afm_pipe.ranks import RankLostError, end, env_rank
from afm_pipe.signals import Stopped, end_with_dvc, heeded

P = ParamSpec("P")
T = TypeVar("T")
SECONDS_BETWEEN_LINES = 5.0


class Tick(NamedTuple):
    """Progress of one piece of work: `done` of `total` `unit`s, and a few figures worth showing."""

    done: int
    total: int
    unit: str
    facts: str = ""


def follow(title: str, ticks: Generator[Tick, None, T]) -> T:
    """Drive a generator of ticks to its end, showing progress and time left; return what it returns."""
    render = _silent if env_rank() > 0 else _live if sys.stderr.isatty() else _plain
    return render(title, ticks)


def _silent(title: str, ticks: Generator[Tick, None, T]) -> T:
    while True:
        try:
            next(ticks)
        except StopIteration as end:
            return end.value


def _live(title: str, ticks: Generator[Tick, None, T]) -> T:
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


def _plain(title: str, ticks: Generator[Tick, None, T]) -> T:
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


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end a user's mistake with one message on stderr and exit code 1, without a stack trace.

    Asked to end by a signal, it ends with one line too, and an exit code that says so (afm_pipe/signals.py).
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with heeded():
                end_with_dvc()
                command(*args, **kwargs)
        except Stopped as stopped:
            end(str(stopped), stopped.code, agreed=True)
        except UserError as error:
            end(f"error: {error}", 1, lost=isinstance(error, RankLostError))

    return run


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, its first column to the left and the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)  # cells as Text, since brackets in names are no markup
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=200, file=StringIO())
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
