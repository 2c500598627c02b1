"""Cores and memory under affinity and control groups, on the kernel's files as they look in containers."""

import os
from pathlib import Path

import psutil
import pytest

from afm_pipe.runtime.machine import available_memory, usable_cores

GIB = 1 << 30


def groups(root: Path, proc: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Write /proc/self/cgroup and files of the mount; return both places."""
    (root / "cgroup").write_text(proc)
    for name, text in files.items():
        (root / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "mount" / name).write_text(text)
    return root / "cgroup", root / "mount"


V2_MEMORY = {
    "memory.max": f"{2 * GIB}\n",
    "memory.current": f"{2 * GIB}\n",
    "memory.stat": f"anon 100\ninactive_file {3 * GIB // 2}\nactive_file 5\n",
}


@pytest.mark.parametrize(
    ("proc", "files", "gib"),
    [
        ("0::/\n", V2_MEMORY, 1.5),  # a container's own group; all but 0.5 GiB is page cache
        ("0::/kubepods/pod1/abc\n", V2_MEMORY, 1.5),  # the host's path, which is not visible in the container
        ("0::/job/step\n", {f"job/{name}": text for name, text in V2_MEMORY.items()} | {"job/step/x": ""}, 1.5),
        ("0::/a\n", {"a/memory.max": "max\n", "a/memory.current": "1\n"} | V2_MEMORY, 1.5),
        (
            "5:cpu,cpuacct:/x\n9:memory:/slurm/job\n",
            {
                "memory/slurm/job/memory.limit_in_bytes": f"{GIB}\n",
                "memory/slurm/job/memory.usage_in_bytes": f"{GIB}\n",
                "memory/slurm/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 4}\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "1\n",
            },
            0.25,
        ),
    ],
)
def test_free_memory_is_that_of_the_tightest_group_and_counts_the_page_cache(
    tmp_path: Path, proc: str, files: dict[str, str], gib: float
) -> None:
    assert available_memory(*groups(tmp_path, proc, files)) == gib * GIB


@pytest.mark.parametrize("proc", ["", "0::/\n", "garbage\n1:2\n"])
def test_without_limits_free_memory_is_the_machines(tmp_path: Path, proc: str) -> None:
    found = available_memory(*groups(tmp_path, proc, {"memory.max": "max\n", "memory.current": "1\n"}))
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("proc", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),
        ("3:cpuacct,cpu:/y\n", {"cpu/y/cpu.cfs_quota_us": "100000\n", "cpu/y/cpu.cfs_period_us": "100000\n"}, 1),
        ("3:cpu:/y\n", {"cpu/y/cpu.cfs_quota_us": "-1\n", "cpu/y/cpu.cfs_period_us": "100000\n"}, 64),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
    ],
)
def test_cores_are_those_of_the_affinity_and_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proc: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert usable_cores(*groups(tmp_path, proc, files)) == cores


def test_cores_are_those_a_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
