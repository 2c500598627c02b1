"""A pool runs each job once it is ready, whatever happens to the others."""

import multiprocessing
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from afm_pipe.distributed import pool
from afm_pipe.distributed.pool import run_jobs
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress, track


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


def test_nothing_to_do_starts_nothing(project: Path) -> None:
    Path("a").touch()
    assert [progress.done for progress in run_jobs([FileJob("a")], None, 2, "jobs")] == [0, 1]
    assert not multiprocessing.active_children()
