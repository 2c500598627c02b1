"""An exclusive lock on a folder: one process at a time writes it, on one machine or several.

It combines two locks, since neither is enough. `flock` on the file `lock` is released by the kernel however its holder
ends, but a shared file system may restrict it to one machine, not support it, or keep it for a machine that died. The
lease, `lease-N`, is a file that every machine sees: its holder creates it exclusively and touches it every few seconds.
When the holder stops touching it, another process creates lease N + 1 and holds the lock if it then finds no lease but
its own and the dead one. A process whose file is gone, for instance after a suspend, has lost it.

The age of a lease is measured with the file system's own clock, so the machines' clocks do not matter. Assumed of the
file system: creating a file exclusively is atomic, and a listing after that shows all files created before (NFS 3 and
later, Lustre, GPFS, CephFS; not object stores mounted as folders).
"""

import errno
import fcntl
import json
import os
import random
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
from afm_pipe.runtime.files import json_value

INTERVAL = 5.0  # seconds from one touch of a lease to the next
STALE = 6 * INTERVAL
CLOCK_KEPT = 60.0  # seconds for which a measured difference of clocks is used
NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # the file system does not support flock


class HeldError(UserError):
    """Another process holds the lease."""


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

    Waits up to `STALE` seconds for a silent holder on another machine. Raises HeldError naming a holder that is alive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_flock = True
        except BlockingIOError:
            newest = _newest(folder)
            if newest.content.get("machine", _machine()) == _machine():
                raise _held(folder, newest) from None
            has_flock = False  # a file server may keep the lock of a machine that died
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            has_flock = False
        lease = _acquire(folder, has_flock)
        try:
            yield lease
        finally:
            lease.release()


def holder_of(folder: Path) -> str | None:
    """Return the process that seems to hold a folder, if any, without trying its lock, which another may need now."""
    import psutil

    lease = max(folder.glob("lease-*"), default=None)
    if lease is None:
        return None
    pid, host = json_value(lease, "pid"), json_value(lease, "host")  # opens it first, as `_read` does
    here = host == socket.gethostname() and isinstance(pid, int)
    if here and not (0 < pid < 1 << 31 and psutil.pid_exists(pid)):
        return None
    try:
        silent = _time_of(folder) - lease.stat().st_mtime
    except OSError:
        return None  # released meanwhile
    return f"process {pid} on {host}" if silent < STALE else None


def _acquire(folder: Path, has_flock: bool) -> Lease:
    token = uuid.uuid4().hex
    while True:
        known = sorted(folder.glob("lease-*"))
        if not known or _await_death(folder, _read(known[-1]), has_flock):
            path = folder / f"lease-{_number(known[-1]) + 1 if known else 1:06d}"
            if _create(path, token):
                if {*folder.glob("lease-*")} <= {path, *known}:
                    for old in known:
                        old.unlink(missing_ok=True)
                    return Lease(path, token)
                path.unlink(missing_ok=True)  # others acquired and released other numbers in the meantime
        time.sleep(random.uniform(0, INTERVAL / 10))


def _await_death(folder: Path, lease: _LeaseFile, has_flock: bool) -> bool:
    """Return True once the holder of `lease` is known to be dead, False if it releases it.

    Raises HeldError if it lives.
    """
    waiting_since = time.monotonic()
    while lease.path is not None:
        if has_flock and lease.content.get("machine") == _machine():
            return True  # a holder on this machine would also hold the flock
        now = _read(lease.path)
        if now.path is not None and now.touched != lease.touched:
            raise _held(folder, now)
        # Two conditions, since the file system's clock may jump and this process may only just have started to wait.
        silent = _file_system_time(folder) - (lease.touched or 0) > STALE
        if now.path is not None and silent and time.monotonic() - waiting_since > 2 * INTERVAL:
            return True
        lease = now
        time.sleep(INTERVAL / 10)
    return False


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


_differences: dict[int, tuple[float, float]] = {}  # by device: when measured, its clock minus this machine's


def _time_of(folder: Path) -> float:
    """Return the time of a folder's file system, measured once a minute; this machine's if it may not be written."""
    device, now = folder.stat().st_dev, time.monotonic()
    measured, difference = _differences.get(device, (-CLOCK_KEPT, 0.0))
    if now - measured >= CLOCK_KEPT:
        try:
            difference = _file_system_time(folder) - time.time()
        except OSError:
            return time.time()
        _differences[device] = now, difference
    return time.time() + difference


def _held(folder: Path, lease: _LeaseFile) -> HeldError:
    return HeldError(
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
