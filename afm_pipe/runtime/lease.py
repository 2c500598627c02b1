"""One run, one owner: a folder that one process at a time may write, on one machine or several.

Two locks, for each fails where the other holds. `flock` on the file `lock` is let go by the kernel when its holder
ends, however it ends, but shared file systems may keep it to one machine, or not have it. The lease is a file that
every machine sees, `lease-N`: made by an operation of which only one can succeed, and touched by its holder every few
seconds. A lease that its holder no longer touches is followed by N + 1. So whoever holds the highest number is the
owner, and a holder that finds its own file gone (after a suspend, say) knows that it is not.

Ages are differences of times that the file system itself gave, so that the clocks of the machines do not matter.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from afm_pipe.runtime.errors import UserError

INTERVAL = 5.0  # seconds from one touch of a lease to the next
STALE = 6 * INTERVAL
NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # of file systems without


class LeaseLostError(UserError):
    """Another process has taken over what this one held."""


class Lease:
    """A folder held by this process."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token
        self._ended = threading.Event()
        self._toucher = threading.Thread(target=self._touch, daemon=True)
        self._toucher.start()

    def check(self) -> None:
        """Raise LeaseLostError when another process has taken over: call this before writing what counts."""
        if _look(self.path).content.get("token") != self.token:
            raise LeaseLostError(
                f"Found {self.path.parent} taken over by {_holder(_newest(self.path.parent))}, expected it still held "
                "by this process, which must have been suspended: nothing more is written. The other one goes on."
            )

    def release(self) -> None:
        """Let go: the next one need not wait."""
        self._ended.set()
        self._toucher.join()
        if _look(self.path).content.get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                if _look(self.path).content.get("token") != self.token:
                    return  # taken over, as `check` will find
                os.utime(self.path)  # no times given: a server sets its own
            except OSError:
                continue  # out of reach for a moment; for longer, others take over, as `check` will find


class _Look(NamedTuple):
    """What a lease file says, and when it was touched: nothing and None where there is none."""

    path: Path | None = None
    content: dict[str, Any] = {}
    touched: float | None = None


@contextmanager
def hold_lease(folder: Path) -> Iterator[Lease]:
    """Hold `folder` for this process alone, however many machines see it, as long as the block runs.

    Waits where a holder on another machine shows no sign of life, for at most `STALE` seconds. Raises UserError naming
    the holder when it is alive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone_here = True
        except BlockingIOError:
            raise _held(folder, _newest(folder)) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            alone_here = False
        lease = _acquire(folder, alone_here)
        try:
            yield lease
        finally:
            lease.release()


def _acquire(folder: Path, alone_here: bool) -> Lease:
    token = uuid.uuid4().hex
    while True:
        before = _newest(folder)
        if before.path is not None:
            _await_end(folder, before, alone_here)
        number = 1 + (_number(before.path) if before.path else 0)
        path = folder / f"lease-{number:06d}"
        if not _create(path, token):
            continue  # another one was faster
        if _newest(folder).path != path:  # it was far behind, and others have come and gone meanwhile
            path.unlink(missing_ok=True)
            continue
        for old in folder.glob("lease-*"):
            if _number(old) < number:
                old.unlink(missing_ok=True)
        return Lease(path, token)


def _await_end(folder: Path, lease: _Look, alone_here: bool) -> None:
    """Return when the holder of `lease` is known to be gone. Raises UserError when it touches it."""
    assert lease.path is not None
    if alone_here and lease.content.get("machine") == _machine():
        return  # a process of this very machine would hold the flock too
    seen_from = time.monotonic()
    while True:
        now = _look(lease.path)
        if now.path is None:
            return  # let go
        if now.touched != lease.touched:
            raise _held(folder, now)
        # Both must say so: the file system's clock may jump, and this process may just have begun to look.
        if _time_of(folder) - (now.touched or 0) > STALE and time.monotonic() - seen_from > 2 * INTERVAL:
            return
        time.sleep(INTERVAL / 10)


def _create(path: Path, token: str) -> bool:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": token}
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        json.dump(content, file)
    return True


def _newest(folder: Path) -> _Look:
    return max((_look(path) for path in folder.glob("lease-*")), key=lambda look: str(look.path or ""), default=_Look())


def _look(path: Path) -> _Look:
    """Read a lease by opening it, which is what makes a network file system ask its server."""
    try:
        with path.open() as file:
            text, touched = file.read(), os.fstat(file.fileno()).st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return _Look()
    except OSError as error:
        if error.errno == errno.ESTALE:  # how NFS says that a file is gone
            return _Look()
        raise
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = {}  # its holder is about to write it, or was killed there
    return _Look(path, content if isinstance(content, dict) else {}, touched)


def _time_of(folder: Path) -> float:
    """Return what the file system that holds `folder` takes the time to be."""
    probe = folder / f".clock-{uuid.uuid4().hex}"
    probe.touch(exist_ok=False)
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _held(folder: Path, lease: _Look) -> UserError:
    return UserError(f"Found {folder} held by {_holder(lease)}, expected it free: wait for it to end, or stop it.")


def _holder(lease: _Look) -> str:
    content = lease.content
    if "pid" not in content:
        return "another process"
    return f"process {content['pid']} on {content.get('host')} since {content.get('since')}"


def _machine() -> str:
    """Return what tells this machine, since it was booted, from all others; names need not be unique."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()  # not Linux


def _number(path: Path) -> int:
    return int(path.name.removeprefix("lease-"))
