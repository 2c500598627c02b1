"""Being asked to end: by a scheduler, by Ctrl-C, or by the end of whoever started this process.

SIGTERM and SIGUSR1 (how schedulers announce that they take the machine back) end a command with exit code 75,
EX_TEMPFAIL: start me again. SIGINT (Ctrl-C) ends it with 130. A training finishes its update and writes a checkpoint
first; a second SIGINT ends it at once. Other work ends at once, and what it had written whole is kept.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from afm_pipe.runtime.environment import env_rank

if TYPE_CHECKING:
    import psutil

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # as a shell reports SIGINT
GRACE = 300.0  # seconds that an orphan has to write its checkpoint
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}


class Stopped(BaseException):  # not an error, and no `except Exception` may keep it
    """This process was asked to end, and does."""

    def __init__(self, number: int, at_once: bool = False) -> None:
        super().__init__(number, at_once)
        self.number, self.at_once = number, at_once

    @property
    def code(self) -> int:
        """What the process ends with."""
        return INTERRUPTED if self.number == signal.SIGINT else TRY_AGAIN

    def __str__(self) -> str:
        name, how = signal.Signals(self.number).name, " at once" if self.at_once else ""
        if self.number == signal.SIGINT:
            return f"stopped{how} by {name}: to go on, run the same command."
        return f"stopped{how} by {name}: exit code {TRY_AGAIN} asks to be started again; the same command goes on."


class Request:
    """What a training looks at after every update."""

    number: int | None = None
    """Of the signal that asked this process to end, if one did."""


_request: Request | None = None  # of the training that runs in this process


@contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Let signals end what runs in the block by raising `Stopped` there; a signal that is ignored stays so."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    asking = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    before = {number: signal.getsignal(number) for number in asking}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def shutdown_requested() -> Iterator[Request]:
    """Let signals wait in the block until whoever runs there looks at the request; only a second SIGINT raises."""
    global _request
    outer, _request = _request, Request()
    try:
        with graceful_shutdown():
            yield _request
    finally:
        _request = outer


def ignore() -> None:
    """Let signals pass an idle process of a pool by: whoever started it ends it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: None)


def stop_with(starters: "Sequence[psutil.Process]") -> None:
    """Ask this process to end, as SIGTERM does, when one of those that started it is gone."""
    threading.Thread(target=_watch, args=(starters,), daemon=True).start()


def stop_with_parent() -> None:
    """Ask this process to end when the one that started it is gone."""
    import psutil

    parent = psutil.Process().parent()
    if parent is not None:
        stop_with([parent])


def stop_with_dvc() -> None:
    """Ask this process to end when the `dvc` that runs it as a stage is gone, which ends without telling its stages."""
    if "DVC_STAGE" not in os.environ:
        return  # a training with nohup outlives the shell that started it
    import psutil

    starters = []
    for parent in psutil.Process().parents():
        starters.append(parent)
        if parent.name() not in SHELLS:  # dvc runs a stage through a shell
            break
    stop_with(starters)


def _ask(number: int, frame: Any) -> None:
    if _request is None:
        raise Stopped(number)
    if _request.number == number == signal.SIGINT:
        raise Stopped(number, at_once=True)
    if _request.number is None:
        _request.number = number
        more = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        line = f"{signal.Signals(number).name}: finishing this update and writing a checkpoint{more}\n"
        if env_rank() == 0:  # the ranks stop together
            os.write(2, line.encode())  # a handler may interrupt a print, in which another one is not allowed


def _watch(starters: "Sequence[psutil.Process]") -> None:
    while all(map(_alive, starters)):
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while signal.getsignal(signal.SIGTERM) == _ask and time.monotonic() < deadline:
        time.sleep(0.1)  # it writes its checkpoint; idle processes of a pool have nothing to write
    os._exit(TRY_AGAIN)


def _alive(process: "psutil.Process") -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
