"""Progress lines: work that reports nothing for long still says that it is alive, on a console of any encoding."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from itertools import pairwise

import pytest

from afm_pipe.reporting import titles
from afm_pipe.runtime import progress
from afm_pipe.runtime.progress import Progress, track
from tests.conftest import ROOT


def test_silent_work_says_how_far_it_is_and_for_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.5)

    def work() -> Generator[Progress, None, str]:
        time.sleep(1.2)
        yield Progress(3, 9, "trials")
        time.sleep(2.2)
        return "done"

    assert track("table x", work()) == "done"
    said = capsys.readouterr().err
    assert "table x: working, for 1 s" in said
    assert "table x: 3/9 trials, for 2 s" in said or "table x: 3/9 trials, for 3 s" in said
    time.sleep(1.2)
    assert capsys.readouterr().err == "", "the work has ended"


def test_each_part_of_work_has_a_rate_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.5)

    def work() -> Generator[Progress]:
        yield Progress(4500, 4500, "images")
        for done in (0, 60, 120):
            yield Progress(done, 300, "updates")
            time.sleep(0.6)

    track("autoencoder", work())
    said = capsys.readouterr().err
    assert "unknown" not in said
    assert "autoencoder: 120/300 updates, ETA 2 s" in said or "autoencoder: 120/300 updates, ETA 1 s" in said


def test_no_time_is_estimated_from_the_first_moments_of_a_pool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)

    def work() -> Generator[Progress]:
        for fraction in (0.0, 1e-5, 0.01):
            yield Progress(0, 34, "jobs", "", fraction)
            time.sleep(0.01)

    track("pool", work())
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["pool: 0/34 jobs, ETA unknown"] * 2
    assert said[2].startswith("pool: 0/34 jobs, ETA ") and said[2].endswith(" s")


class Terminal(io.StringIO):
    """A terminal that keeps what it shows."""

    def isatty(self) -> bool:
        return True


def test_the_live_bar_counts_whole_units_as_the_plain_lines_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    track("pool", (Progress(3, 34, "jobs", "", fraction) for fraction in (0.4, 0.5)))
    assert "3/34 jobs" in shown.getvalue() and "17/34" not in shown.getvalue()


class Clock:
    """Time and threads of a simulation: the thread that says what works runs at once, for a minute of its waiting."""

    def __init__(self, each_second: Callable[[], None]) -> None:
        self.now, self.each_second = 1000.0, each_second
        self.lines: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def Event(self) -> "Clock":  # noqa: N802  # threading.Event
        return self

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.each_second()
        return self.now >= 1060

    def set(self) -> None: ...

    def Thread(self, target: Callable[[], None], daemon: bool) -> "Clock":  # noqa: N802  # threading.Thread
        self.target = target
        return self

    def start(self) -> None: ...


@pytest.mark.parametrize("every", [None, 1, 3, 4, 7, 9, 11])
def test_no_ten_seconds_pass_without_a_line(every: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the work reports never or every few seconds; the clock is simulated."""
    done = 0

    def work() -> None:
        nonlocal done
        if every is not None and int(clock.now) % every == 0:
            render(Progress(done := done + 1, 100, "images"))

    clock = Clock(work)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "threading", clock)
    monkeypatch.setattr(progress, "_say", lambda line: clock.lines.append(clock.now))
    with progress._plain("x") as render:
        clock.target()
    gaps = [later - earlier for earlier, later in pairwise([1000.0, *clock.lines, clock.now])]
    assert max(gaps) <= 10, gaps


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_console_that_lacks_a_character_shows_another(encoding: str) -> None:
    code = "from afm_pipe.runtime.commands import user_command\nuser_command(lambda: print('λ_ot ± 0.2 – µ'))()"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?_ot" in done.stdout


@pytest.mark.parametrize(
    ("console", "code", "said"),
    [
        ("2>&-", 0, "done\n"),
        (">&- 2>&-", 0, ""),
        ("2>/dev/full", 0, "done\n"),
        (">/dev/full", 1, "error: Found the output or a file not writable (No space left on device)"),
        ("2>&1 >/dev/full | cat", 0, "error: Found the output or a file not writable (No space left on device)"),
    ],
)
def test_a_console_that_is_closed_or_full_ends_no_work_and_no_traceback_is_shown(
    console: str, code: int, said: str
) -> None:
    work = (
        "from afm_pipe.runtime.commands import user_command\nfrom afm_pipe.runtime.progress import Progress, track\n"
        "def work():\n    yield Progress(3, 3, 'images')\n"
        "def main():\n    track('x', work())\n    print('done')\n"
        "user_command(main)()"
    )
    words = ["sh", "-c", f'"{sys.executable}" -c "$0" {console}', work]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_what_rounding_leaves_of_zero_is_shown_as_zero() -> None:
    assert titles.number(2.17e-19) == titles.number(-2.17e-19) == titles.number(0.0)
    assert titles.number(1.2e-5) == "1.20e-5"
