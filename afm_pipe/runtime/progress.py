"""Progress reports: a live bar on a terminal, a plain line every few seconds elsewhere.

Long-running library functions are generators of `Progress`; `track` runs one, shows it and returns its result.
"""

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

from afm_pipe.runtime.environment import env_rank

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 5.0
SECONDS_OF_SILENCE = 9.0
FIRST_ESTIMATE = 0.005  # of the work must be done before its time is estimated, where units differ in work


class Progress(NamedTuple):
    """`done` of `total` `unit`s, and details to show with them."""

    done: int
    total: int
    unit: str
    facts: str = ""
    fraction: float | None = None
    """Share of the work that is done, where units differ in work; None: done / total."""

    @property
    def position(self) -> float:
        """The work that is done, in units."""
        return self.done if self.fraction is None else self.fraction * self.total


_report: Callable[[Progress], None] | None = None  # receives the progress of all work in this process


@contextmanager
def report_to(report: Callable[[Progress], None]) -> Iterator[None]:
    """Report progress to a function, at most every second, instead of showing it."""
    global _report
    reported = 0.0

    def throttled(progress: Progress) -> None:
        nonlocal reported
        if time.monotonic() - reported >= 1:
            reported = time.monotonic()
            report(progress)

    outer, _report = _report, throttled
    try:
        yield
    finally:
        _report = outer


def track(title: str, work: Generator[Progress, None, T]) -> T:
    """Run a generator to its end, showing progress and time left; return what it returns."""
    with alive(title) as render:
        return finish(work, render)


@contextmanager
def alive(title: str) -> Iterator[Callable[[Progress], None]]:
    """Show that a block is running; yield a function that shows its progress, if it reports any."""
    if env_rank() > 0:
        yield lambda progress: None
        return
    if _report is not None:
        yield _report
        return
    with (_live if sys.stderr.isatty() else _plain)(title) as render:
        yield render


def finish(work: Generator[Progress, None, T], render: Callable[[Progress], None] = lambda progress: None) -> T:
    """Run a generator to its end, silently by default; return what it returns."""
    while True:
        try:
            render(next(work))
        except StopIteration as end:
            return end.value


def _say(line: str) -> None:
    with suppress(OSError):  # a full disk or a closed pipe ends the lines, not the work
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _live(title: str) -> Iterator[Callable[[Progress], None]]:
    from rich import progress as bar
    from rich.console import Console

    columns = (
        bar.TextColumn("[bold]{task.description}"),
        bar.BarColumn(),
        bar.TextColumn("{task.fields[count]}"),  # whole units; the bar and its ETA follow the work
        bar.TimeElapsedColumn(),
        bar.TextColumn("ETA"),
        bar.TimeRemainingColumn(),
        bar.TextColumn("[dim]{task.fields[facts]}"),
    )
    with bar.Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(title, total=None, count="", facts="")

        def render(now: Progress) -> None:
            count = f"{now.done}/{now.total} {now.unit}"
            shown.update(task, completed=now.position, total=now.total, count=count, facts=now.facts)

        yield render


@contextmanager
def _plain(title: str) -> Iterator[Callable[[Progress], None]]:
    started = last = since = time.monotonic()
    first, counted = 0.0, ""  # since when, from where and in which unit the rate is counted
    shown, ended = "working", threading.Event()

    def render(progress: Progress) -> None:
        nonlocal last, since, first, counted, shown
        done, total, unit, facts, _ = progress
        shown = f"{done}/{total} {unit}"
        now = time.monotonic()
        if unit != counted:  # the start, a resume, or the next part of the work
            since, first, counted = (now if counted else since), progress.position, unit
        if now - last < SECONDS_BETWEEN_LINES and done < total:
            return
        last = now
        rate = (progress.position - first) / max(now - since, 1e-9)
        left = total - progress.position
        known = rate > 0 and (progress.fraction is None or progress.position - first >= FIRST_ESTIMATE * total)
        time_left = f"ETA {left / rate:.0f} s" if known else "ETA unknown" if left else "ETA 0 s"
        _say(f"{title}: {shown}, {time_left}  {facts}".rstrip())

    def say_so() -> None:
        """Print a line where the work reports nothing for long, as while a trial of a table trains."""
        nonlocal last
        while not ended.wait(1):
            now = time.monotonic()
            if now - last >= SECONDS_OF_SILENCE:
                last = now
                _say(f"{title}: {shown}, for {now - started:.0f} s")

    threading.Thread(target=say_so, daemon=True).start()
    try:
        yield render
    finally:
        ended.set()
