"""A pool runs each job once it is ready, whatever happens to the others."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from afm_pipe.distributed import pool
from afm_pipe.distributed.pool import run_jobs
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress, track
from tests.interrupts import interrupted


class FileJob(NamedTuple):
    """Writes a file with the process and the context; needs the files of other jobs."""

    name: str
    needs: tuple[str, ...] = ()
    fails: bool = False
    weight: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def is_done(self) -> bool:
        return Path(self.name).exists()

    @property
    def is_ready(self) -> bool:
        return self.holder is None and all(Path(name).exists() for name in self.needs)

    @property
    def holder(self) -> str | None:
        return "process 1 on elsewhere" if Path("held").exists() else None

    def run(self, context: Any) -> bool:
        assert self.is_ready
        if self.fails:
            raise UserError(f"{self.name} failed")
        track(self.name, (Progress(done, 3, "updates") for done in range(4)))
        Path(self.name).write_text(f"{os.getpid()} {context}")
        return True


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_run_once_they_are_ready_and_a_failure_stops_only_what_needs_it(project: Path, workers: int) -> None:
    jobs = [FileJob("last", ("b", "c")), FileJob("b", ("a",)), FileJob("bad", fails=True), FileJob("after", ("bad",))]
    jobs += [FileJob("a", weight=5), FileJob("c")]
    shown: list[Progress] = []
    with pytest.raises(UserError, match="bad failed"):
        shown.extend(run_jobs(jobs, "context", workers, "jobs"))
    assert {path.name for path in project.iterdir()} == {"a", "b", "c", "last"}
    pids = {Path(name).read_text().split()[0] for name in ("a", "b", "c", "last")}
    assert (str(os.getpid()) in pids) == (workers == 1) and Path("a").read_text().endswith(" context")
    fractions = [progress.position / progress.total for progress in shown]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == pytest.approx(0.9)


def test_what_another_process_holds_is_awaited_and_counts_when_that_has_done_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "POLL", 0.01)
    Path("held").touch()
    said = []
    for progress in run_jobs([FileJob("a")], None, 1, "jobs"):
        said.append(progress.facts)
        if "waiting" in progress.facts:
            Path("a").touch()  # the other process has done it
    assert "waiting for process 1 on elsewhere" in said
    assert progress.done == 1


class HeldJob(FileJob):
    """Seems ready, but another process holds it until the files that it needs are there."""

    @property
    def is_ready(self) -> bool:
        return True

    def run(self, context: Any) -> bool:
        with Path("tries").open("a") as file:
            file.write(f"{self.name}\n")
        time.sleep(0.05)  # longer than POLL
        return all(Path(name).exists() for name in self.needs) and super().run(context)


def test_a_job_that_turns_out_to_be_held_is_tried_again_after_the_others(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "POLL", 0.01)
    shown = []
    for progress in run_jobs([HeldJob("held", ("freed",)), HeldJob("a"), HeldJob("b")], None, 1, "jobs"):
        shown.append(progress)
        assert len(shown) < 20, "no other job starts"
        if "waiting" in progress.facts:
            Path("freed").touch()
    assert Path("tries").read_text().split()[:4] == ["held", "a", "b", "held"]
    assert shown[-1].done == 3


class KilledJob(FileJob):
    """Ends its process as the kernel does where memory is short, while another process has no job."""

    def run(self, context: Any) -> bool:
        time.sleep(2)  # the other process has nothing to do by then
        os.kill(os.getpid(), signal.SIGKILL)
        return True


def test_a_killed_process_of_the_pool_is_an_error_of_one_line(project: Path) -> None:
    with pytest.raises(UserError, match=r"one of the pool's 2 processes killed.*AFM_WORKERS below 2"):
        list(run_jobs([KilledJob("killed"), FileJob("a")], None, 2, "jobs"))
    assert not multiprocessing.active_children()


INTERRUPTED = """
import sys

from afm_pipe.distributed.pool import run_jobs
from afm_pipe.runtime.commands import user_command
from tests.distributed.test_pool import FileJob
from tests.interrupts import Loading

user_command(lambda: list(run_jobs([FileJob("a"), FileJob("b")], Loading(sys.argv[1]), 2, "jobs")))()
"""


def test_ctrl_c_while_the_processes_start_is_one_line(tmp_path: Path) -> None:
    said = "stopped by SIGINT: to resume, run the same command again.\n"
    assert interrupted(INTERRUPTED, tmp_path, 2) == (said, 130)


def test_nothing_to_do_starts_nothing(project: Path) -> None:
    Path("a").touch()
    assert [progress.done for progress in run_jobs([FileJob("a")], None, 2, "jobs")] == [0, 1]
    assert not multiprocessing.active_children()


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


class CoresJob(FileJob):
    """Writes the cores of its process once they are as many as expected; the first jobs end together."""

    def run(self, context: tuple[str, ...]) -> bool:
        expected, until = (len(context) if self.needs else 1), time.monotonic() + 30
        while len(cores := os.sched_getaffinity(0)) != expected and time.monotonic() < until:
            time.sleep(0.01)
        Path(self.name).write_text(" ".join(map(str, sorted(cores))))
        while not all(Path(name).exists() for name in context) and time.monotonic() < until:
            time.sleep(0.01)
        return True


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_processes_that_are_all_at_work_have_a_core_each_and_the_last_may_use_all(project: Path) -> None:
    first = tuple(f"job {number}" for number in range(CORES))
    list(run_jobs([*map(CoresJob, first), CoresJob("last", first)], first, CORES, "jobs"))
    everything = {str(core) for core in os.sched_getaffinity(0)}
    assert sorted(Path(name).read_text() for name in first) == sorted(everything)
    assert set(Path("last").read_text().split()) == everything
