"""Jobs on a pool of processes of this machine, each with one thread.

A job is done once, whoever does it: it may belong to a process of another pool or another machine, which holds its
lease. Results do not depend on the number of processes.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from afm_pipe.runtime import signals
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.machine import core_of_each
from afm_pipe.runtime.progress import Progress, report_to

POLL = 2.0  # seconds from one look at the jobs to the next
TRAINING_SHARE = 0.85  # of the time of a job that trains and then measures


class Job(Protocol):
    """A job, which is sent to its process. `context` is what the jobs share; each process has its own."""

    @property
    def weight(self) -> float:
        """Estimated work, in any unit."""

    @property
    def is_done(self) -> bool:
        """Whether its results exist and are current."""

    @property
    def is_ready(self) -> bool:
        """Whether what it needs exists, and no other process seems to hold it."""

    @property
    def holder(self) -> str | None:
        """The other process that seems to hold it, if any."""

    def run(self, context: Any) -> bool:
        """Do the job; return False if another process holds it."""


def run_jobs(jobs: Sequence[Job], context: Any, num_workers: int, unit: str) -> Generator[Progress, None, None]:
    """Run jobs, each once it is ready, in the given order where several are; end when none is missing.

    A failed job does not stop the others: the first error is raised once no other job can begin. Raises UserError at
    once if a process is killed.
    """
    left = dict(enumerate(jobs))  # by number
    weights = [job.weight for job in jobs]
    running: dict[Future[bool], int] = {}
    parts: dict[int, Progress] = {}  # of the running jobs
    retry_at: dict[int, float] = {}  # of jobs that another process turned out to hold
    errors: list[Exception] = []

    def progress(facts: str = "") -> Progress:
        missing = sum(weights[number] * (1 - _share(parts.get(number))) for number in left)
        shown = ", ".join(f"{jobs[number]} {part.done}/{part.total}" for number, part in parts.items())
        fraction = 1 - missing / max(sum(weights), 1e-9)
        return Progress(len(jobs) - len(left), len(jobs), unit, facts or shown, fraction)

    yield progress()
    num_workers = min(num_workers, len(jobs))
    cores, bound = core_of_each(num_workers), False
    with _pool(num_workers, context) as (executor, reports):
        while True:
            left = {number: job for number, job in left.items() if number in running.values() or not job.is_done}
            for number, job in [*left.items()]:
                idle = number not in running.values() and time.monotonic() >= retry_at.get(number, 0.0)
                if len(running) < num_workers and idle and job.is_ready:
                    running[executor.submit(_run, number, job)] = number
            if (len(running) == num_workers) != bound:
                bound = not bound
                _bind(cores, bound)
            if not running and (errors or not left):
                yield progress()
                break
            ended, _ = wait(running, POLL, FIRST_COMPLETED)
            while reports is not None and not reports.empty():
                number, part = reports.get()
                parts |= {number: part} if number in running.values() else {}
            for future in ended:
                number = running.pop(future)
                parts.pop(number, None)
                if (error := future.exception()) is not None:
                    if not isinstance(error, Exception) or isinstance(error, BrokenProcessPool):
                        raise error
                    errors.append(error)
                    del left[number]
                elif future.result():
                    del left[number]
                else:
                    left[number] = left.pop(number)  # behind the others
                    retry_at[number] = time.monotonic() + POLL
            yield progress()
            if not running and left and not ended:
                holders = (job.holder for job in left.values())
                yield progress(f"waiting for {next(filter(None, holders), 'another process')}")
                time.sleep(POLL)
    if errors:
        raise errors[0]


def _bind(cores: Sequence[int], bound: bool) -> None:
    """Bind each process of the pool to its own core while all are at work; free them when some have no job."""
    processes = sorted(process.pid for process in multiprocessing.active_children() if process.pid is not None)
    for process, core in zip(processes, cores, strict=False):  # without cores: nothing to do
        with suppress(OSError):  # it has just ended, or may not be moved: this is for speed alone
            os.sched_setaffinity(process, {core} if bound else cores)


def _share(part: Progress | None) -> float:
    """Return the share of a job that is done, from the progress of its training or of what follows."""
    if part is None:
        return 0.0
    return TRAINING_SHARE * part.done / max(part.total, 1) if part.unit == "updates" else TRAINING_SHARE


class _ThisProcess(Executor):
    """Runs what is submitted at once."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Processes(ProcessPoolExecutor):
    """Starts processes, with what is submitted, that receive no SIGINT until `_start` ignores it."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        with signals.interrupts_blocked():
            return super().submit(function, *args, **kwargs)


@contextmanager
def _pool(num_workers: int, context: Any) -> Iterator[tuple[Executor, Any]]:
    """Give an executor and a queue of its jobs' progress; on a signal, end its processes.

    This process does the jobs itself if one suffices; then there is no queue.
    """
    global _context
    if num_workers <= 1:
        _context = context
        yield _ThisProcess(), None
        return
    spawn = multiprocessing.get_context("spawn")
    stopping, reports = spawn.Event(), spawn.SimpleQueue()
    pool = _Processes(num_workers, spawn, _start, (context, stopping, reports))
    try:
        yield pool, reports
    except (signals.Stopped, GeneratorExit):
        stopping.set()  # stops processes that are between two jobs
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    except BrokenProcessPool:
        raise UserError(
            f"Found one of the pool's {num_workers} processes killed, perhaps for lack of memory, expected all to "
            f"live: set AFM_WORKERS below {num_workers} and run the same command again, which resumes."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_context: Any  # of this process
_stopping: Any = None  # in a process of a pool, the pool's event: start no more jobs
_reports: Any = None  # and its queue of progress


def _start(context: Any, stopping: Any, reports: Any) -> None:
    global _context, _stopping, _reports
    import psutil
    import torch

    signals.ignore_signals()
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    signals.stop_with([psutil.Process(parent.pid)])
    torch.set_num_threads(1)
    _context, _stopping, _reports = context, stopping, reports


def _run(number: int, job: Job) -> bool:
    with signals.graceful_shutdown():
        if _stopping is None:
            return job.run(_context)
        if _stopping.is_set():
            raise signals.Stopped(signal.SIGTERM)
        with report_to(lambda progress: _reports.put((number, progress))):
            return job.run(_context)
