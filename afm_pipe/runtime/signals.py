"""Graceful shutdown: on a scheduler's signal, on Ctrl-C, or when the parent process is gone.

SIGTERM and SIGUSR1, with which schedulers announce preemption, end a command with exit code 75 (EX_TEMPFAIL: restart
it). SIGINT (Ctrl-C) ends it with 130. Training first finishes its update and writes a checkpoint; a second SIGINT ends
it immediately. Other work ends immediately; complete files remain.
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

EXIT_RETRY = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # a shell's exit code for SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE = 300.0  # seconds in which an orphan can write its checkpoint
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}


class Stopped(BaseException):  # not an Exception, so that `except Exception` does not swallow it
    """A signal ends this process."""

    def __init__(self, number: int, at_once: bool = False) -> None:
        super().__init__(number, at_once)
        self.number, self.at_once = number, at_once

    @property
    def code(self) -> int:
        """Exit code of the process."""
        return EXIT_INTERRUPTED if self.number == signal.SIGINT else EXIT_RETRY

    def __str__(self) -> str:
        name, how = signal.Signals(self.number).name, " at once" if self.at_once else ""
        if self.number == signal.SIGINT:
            return f"stopped{how} by {name}: to resume, run the same command again."
        return f"stopped{how} by {name}: exit code {EXIT_RETRY} requests a restart; the same command resumes."


class ShutdownRequest:
    """Whether a signal has requested a shutdown; training checks it after every update."""

    number: int | None = None
    """The signal, or None."""


_request: ShutdownRequest | None = None  # of the training running in this process


@contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Make signals raise `Stopped` in the block; ignored signals stay ignored."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def shutdown_requested() -> Iterator[ShutdownRequest]:
    """Make signals set the request, which the block checks, instead of raising; a second SIGINT raises `Stopped`."""
    global _request
    outer, _request = _request, ShutdownRequest()
    try:
        with graceful_shutdown():
            yield _request
    finally:
        _request = outer


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Delay SIGINT to the end of the block; processes that are started in it receive none until they unblock it."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def ignore_signals() -> None:
    """Ignore signals in an idle worker of a pool, which its parent ends; SIGINT may have been blocked until now."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def stop_with(processes: "Sequence[psutil.Process]") -> None:
    """Send SIGTERM to this process once any of `processes` is gone."""
    threading.Thread(target=_monitor, args=(processes,), daemon=True).start()


def stop_with_parent() -> None:
    """Send SIGTERM to this process once its parent is gone."""
    import psutil

    parent = psutil.Process().parent()
    if parent is not None:
        stop_with([parent])


def stop_with_dvc() -> None:
    """In a DVC stage, send SIGTERM to this process once `dvc` is gone: on SIGTERM, `dvc` leaves its stages running."""
    if "DVC_STAGE" not in os.environ:
        return  # training started with nohup outlives its shell
    import psutil

    ancestors = []
    for parent in psutil.Process().parents():
        ancestors.append(parent)
        if parent.name() not in SHELLS:  # dvc runs a stage through a shell
            break
    stop_with(ancestors)


def _handle(number: int, frame: Any) -> None:
    if _request is None:
        raise Stopped(number)
    if _request.number == number == signal.SIGINT:
        raise Stopped(number, at_once=True)
    if _request.number is None:
        _request.number = number
        more = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        line = f"{signal.Signals(number).name}: finishing this update and writing a checkpoint{more}\n"
        if env_rank() == 0:  # all processes of the group stop together
            os.write(2, line.encode())  # the handler may have interrupted a print, and print is not reentrant


def _monitor(processes: "Sequence[psutil.Process]") -> None:
    while all(map(_alive, processes)):
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while signal.getsignal(signal.SIGTERM) == _handle and time.monotonic() < deadline:
        time.sleep(0.1)  # training writes its checkpoint; an idle worker has nothing to write
    os._exit(EXIT_RETRY)


def _alive(process: "psutil.Process") -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
