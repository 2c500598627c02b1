"""Progress lines: work that reports nothing for long still says that it is alive, on a console of any encoding."""

import os
import subprocess
import sys
import time
from collections.abc import Generator

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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_console_that_lacks_a_character_shows_another(encoding: str) -> None:
    code = "from afm_pipe.runtime.commands import user_command\nuser_command(lambda: print('λ_ot ± 0.2 – µ'))()"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?_ot" in done.stdout


def test_what_rounding_leaves_of_zero_is_shown_as_zero() -> None:
    assert titles.number(2.17e-19) == titles.number(-2.17e-19) == titles.number(0.0)
    assert titles.number(1.2e-5) == "1.20e-5"
