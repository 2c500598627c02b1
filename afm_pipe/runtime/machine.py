"""The cores and the memory that this process may use: of the machine, its affinity, and its control groups.

A container, a pod and a SLURM step limit both by control groups (version 1 or 2), at any level of their hierarchy.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # bytes; version 1 writes the largest page-aligned integer where there is no limit


class _Names(NamedTuple):
    """The files of a version of control groups."""

    limit: str
    used: str
    cache: str
    """Key of memory.stat: the page cache that the kernel gives back when memory is needed."""


_V2 = _Names("memory.max", "memory.current", "inactive_file")
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def usable_cores(proc: Path = PROC, mount: Path = MOUNT) -> int:
    """Return the number of cores that this process may use, at least 1; a quota of 1.5 cores counts as 2."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [affinity, *filter(None, map(_quota, _groups("cpu", proc, mount)))]
    return max(1, math.ceil(min(quotas)))


def core_of_each(num_processes: int) -> list[int]:
    """Return a core for each of several processes, if there are as many as cores that this one may use; else nothing.

    Linux divides cores fairly between sessions: beside one busy process of another session it puts two of ours on one
    core, unless each is bound to its own.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    return cores if len(cores) == num_processes else []


def available_memory(proc: Path = PROC, mount: Path = MOUNT) -> int:
    """Return the bytes that this process may still allocate; the page cache counts as available."""
    limits = [free for group in _groups("memory", proc, mount) if (free := _free(group)) is not None]
    import psutil

    return max(0, min([psutil.virtual_memory().available, *limits]))


def _groups(controller: str, proc: Path, mount: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups, and of all groups that these belong to.

    In a container the paths of `proc` may be those of the host: only folders that exist are yielded, and the root of
    the mount, which is then the container's own group.
    """
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return  # no control groups: macOS, Windows
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and controller not in controllers.split(","):
            continue
        root = mount if not controllers else mount / controller
        here = root / path.lstrip("/")
        yield from (group for group in (here, *here.parents) if group.is_relative_to(root) and group.is_dir())


def _quota(group: Path) -> float | None:
    """Return the cores of a group's quota, None if it has none."""
    words = (_read(group / "cpu.max") or "").split()
    if not words:
        words = [_read(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    quota, period = (int(word) if word.isdigit() else 0 for word in (*words, "", "")[:2])
    return quota / period if quota > 0 and period > 0 else None


def _free(group: Path) -> int | None:
    """Return the bytes that a group may still allocate, None if it has no limit."""
    for names in (_V2, _V1):
        limit, used = (_read(group / name) or "" for name in names[:2])
        if limit.isdigit() and used.isdigit() and int(limit) < NO_LIMIT:
            stat = dict(line.split(" ", 1) for line in (_read(group / "memory.stat") or "").splitlines() if " " in line)
            cache = stat.get(names.cache, "0")
            return int(limit) - int(used) + (int(cache) if cache.isdigit() else 0)
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None  # this version, or this group, does not have the file
