"""Estimate how long `dvc repro` takes on this machine, from a few updates of a run, on all cores at a time."""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from statistics import harmonic_mean
from threading import BrokenBarrierError
from typing import Any

from afm_pipe.distributed.launch import Launch
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.params import Params, Run
from afm_pipe.planning.measuring import update_seconds
from afm_pipe.runtime.machine import core_of_each
from afm_pipe.runtime.signals import interrupts_blocked
from afm_pipe.study.trials import run_weight
from afm_pipe.training.engine import Engine

TRAINING_OF_POOL = 0.72  # of the pool's time in the default; the rest draws and measures samples (benchmarks/repro.md)
POOL_OF_ALL = 0.7  # of the time of all stages of the default (benchmarks/repro.md)
UPDATES = 20  # measured by each process
STARTED_WITHIN = 120.0  # seconds, until all processes have begun


def estimate(params: Params, launch: Launch, num_images: int, num_classes: int) -> str:
    """Return a line that says how long all stages take where nothing is current and the pool trains everything.

    If a process that measures is killed or does not start, the line says so.
    """
    weights = {run.model_dump_json(): run_weight(run, name in params.guided) for name, run in params.models.items()}
    for trial in (trial for of_table in params.trials.values() for trial in of_table):
        weights.setdefault(trial.base.model_dump_json(), run_weight(trial.base))
        weights.setdefault(trial.run.model_dump_json(), run_weight(trial.run, trial.run is not trial.base))
    name, run = next(iter(params.runs.items()))
    workers = min(launch.num_workers(), len(weights))
    config = run_config(run, params.latent_shape, num_classes)
    try:
        seconds = seconds_on_all(workers, run, config, launch)
    except (EOFError, BrokenBarrierError) as error:
        slow = isinstance(error, BrokenBarrierError)
        what = f"did not start within {STARTED_WITHIN:.0f} s" if slow else "was killed, perhaps for lack of memory"
        return (
            f"No estimate of the time: one of {workers} processes {what}. If the pool fails too, set AFM_WORKERS below "
            f"{workers}."
        )
    weight = run_weight(run) / run.phases[-1].until_epoch * run.batch_size / num_images  # of an update
    total = sum(weights.values()) / weight * seconds / workers / TRAINING_OF_POOL / POOL_OF_ALL
    return (
        f"About {max(total / 60, 1):.0f} minutes for all stages on this machine: {len(weights)} runs and trials, "
        f"{workers} at a time, {seconds:.2g} s for an update of {name}. What is current is not done again."
    )


def seconds_on_all(workers: int, run: Run, config: ModelConfig, launch: Launch) -> float:
    """Return the seconds of an update beside the same in other processes: cores may share what makes one fast.

    It is the harmonic mean over processes, so that `workers` divided by it is their rate together. Raises EOFError at
    once if a process is killed, and BrokenBarrierError if one does not start within STARTED_WITHIN.
    """
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(workers)
    cores: Sequence[int | None] = core_of_each(workers) or [None] * workers
    processes: dict[Any, BaseProcess] = {}  # by the connection on which each answers
    try:
        with interrupts_blocked():  # in the processes for good: this one ends them
            for core in cores:
                answers, answer = spawn.Pipe(duplex=False)
                arguments = (answer, together, core, run, config, launch)
                process = spawn.Process(target=_measure, args=arguments, daemon=True)
                process.start()
                processes[answers] = process
                answer.close()  # the process has the only copy: its end, however it comes, is the end of the answers
        left, seconds = set(processes), []
        while left:
            first: Any = wait(left)[0]
            left.remove(first)
            seconds.append(first.recv())
            if isinstance(seconds[-1], Exception):
                raise seconds[-1]
        return harmonic_mean(seconds)
    finally:
        for started in processes.values():
            started.kill()
            started.join()


def _measure(
    answer: Connection, together: Barrier, core: int | None, run: Run, config: ModelConfig, launch: Launch
) -> None:
    """Send the seconds of an update, measured while all processes measure, or the error."""
    import torch

    torch.set_num_threads(1)  # as in the pool
    if core is not None:  # likewise
        os.sched_setaffinity(0, {core})
    try:
        together.wait(STARTED_WITHIN)
        engine = Engine.of(launch)
        answer.send(update_seconds(run, config, run.batch_size, launch.torch_device(), engine, UPDATES))
    except Exception as error:
        answer.send(error)
