"""Ctrl-C in a terminal, which sends SIGINT to a command and to every process that it has started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

# A shell starts commands in the background with SIGINT ignored.
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


class Loading:
    """Holds up a process that unpickles it, which then says so in a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return _hold_up, (self.folder,)


def _hold_up(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def interrupted(script: str, folder: Path, processes: int) -> tuple[str, int]:
    """Run a script with the argument `folder`, interrupt it once so many processes load; return stderr and its code."""
    command = [sys.executable, "-c", LISTEN + script, str(folder)]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < processes and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGINT)
    return started.communicate(timeout=60)[1].decode(), started.returncode
