"""An exclusive lock on a folder: one process at a time writes it, on one machine or several.

It combines two locks, since neither is enough. `flock` on the file `lock` is released by the kernel however its holder
ends, but a shared file system may restrict it to one machine or not support it. The lease, `lease-N`, is a file that
every machine sees: its holder creates it exclusively and touches it every few seconds. When the holder stops touching
it, another process creates lease N + 1. The highest number holds the lock; a process whose file is gone, for instance
after a suspend, has lost it.

The age of a lease is measured with the file system's own clock, so the machines' clocks do not matter.
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
NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # the file system does not support flock


class LeaseLostError(UserError):
    """Another process has taken over the lease."""


class Lease:
    """The exclusive lock of this process on a folder."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token
        self._ended = threading.Event()
        self._toucher = threading.Thread(target=self._touch, daemon=True)
        self._toucher.start()

    def check(self) -> None:
        """Raise LeaseLostError if another process has taken over; call this before writing results."""
        if _read(self.path).content.get("token") != self.token:
            raise LeaseLostError(
                f"Found {self.path.parent} taken over by {_holder(_newest(self.path.parent))}, expected this process "
                "to hold it; it was probably suspended. This process writes nothing more; the other one continues."
            )

    def release(self) -> None:
        """Release the lock, so that the next holder does not have to wait."""
        self._ended.set()
        self._toucher.join()
        if _read(self.path).content.get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                if _read(self.path).content.get("token") != self.token:
                    return  # taken over; `check` raises
                os.utime(self.path)  # without explicit times, a file server uses its own clock
            except OSError:
                continue  # unreachable; if this lasts, another process takes over and `check` raises


class _LeaseFile(NamedTuple):
    """Content of a lease file and when it was last touched; path and time are None if there is no file."""

    path: Path | None = None
    content: dict[str, Any] = {}
    touched: float | None = None


@contextmanager
def hold_lease(folder: Path) -> Iterator[Lease]:
    """Hold the exclusive lock on `folder` while the block runs.

    Waits up to `STALE` seconds for a silent holder on another machine. Raises UserError naming a holder that is alive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_flock = True
        except BlockingIOError:
            raise _held(folder, _newest(folder)) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            has_flock = False
        lease = _acquire(folder, has_flock)
        try:
            yield lease
        finally:
            lease.release()


def _acquire(folder: Path, has_flock: bool) -> Lease:
    token = uuid.uuid4().hex
    while True:
        before = _newest(folder)
        if before.path is not None:
            _await_end(folder, before, has_flock)
        number = 1 + (_number(before.path) if before.path else 0)
        path = folder / f"lease-{number:06d}"
        if not _create(path, token):
            continue  # another process was faster
        if _newest(folder).path != path:  # others acquired and released higher numbers in the meantime
            path.unlink(missing_ok=True)
            continue
        for old in folder.glob("lease-*"):
            if _number(old) < number:
                old.unlink(missing_ok=True)
        return Lease(path, token)


def _await_end(folder: Path, lease: _LeaseFile, has_flock: bool) -> None:
    """Wait until the holder of `lease` is known to be gone. Raises UserError if it touches the lease."""
    assert lease.path is not None
    if has_flock and lease.content.get("machine") == _machine():
        return  # a holder on this machine would also hold the flock
    waiting_since = time.monotonic()
    while True:
        now = _read(lease.path)
        if now.path is None:
            return  # released
        if now.touched != lease.touched:
            raise _held(folder, now)
        # Two conditions, since the file system's clock may jump and this process may only just have started to wait.
        if _file_system_time(folder) - (now.touched or 0) > STALE and time.monotonic() - waiting_since > 2 * INTERVAL:
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


def _newest(folder: Path) -> _LeaseFile:
    files = map(_read, folder.glob("lease-*"))
    return max(files, key=lambda file: str(file.path or ""), default=_LeaseFile())


def _read(path: Path) -> _LeaseFile:
    """Read a lease file; opening it makes a network file system ask its server."""
    try:
        with path.open() as file:
            text, touched = file.read(), os.fstat(file.fileno()).st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return _LeaseFile()
    except OSError as error:
        if error.errno == errno.ESTALE:  # the file is gone, on NFS
            return _LeaseFile()
        raise
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = {}  # not written yet, or its holder was killed before writing
    return _LeaseFile(path, content if isinstance(content, dict) else {}, touched)


def _file_system_time(folder: Path) -> float:
    """Return the current time of the file system that holds `folder`."""
    probe = folder / f".clock-{uuid.uuid4().hex}"
    probe.touch(exist_ok=False)
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _held(folder: Path, lease: _LeaseFile) -> UserError:
    return UserError(
        f"Found {folder} held by {_holder(lease)}, expected a free folder: wait for that process to end, or stop it."
    )


def _holder(lease: _LeaseFile) -> str:
    content = lease.content
    if "pid" not in content:
        return "another process"
    return f"process {content['pid']} on {content.get('host')} since {content.get('since')}"


def _machine() -> str:
    """Return an identifier of this machine since its boot; host names need not be unique."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()  # not Linux


def _number(path: Path) -> int:
    return int(path.name.removeprefix("lease-"))
