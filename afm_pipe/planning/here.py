"""Estimate how long `dvc repro` takes on this machine, from a few updates of a run, on all cores at a time."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from statistics import harmonic_mean
from threading import BrokenBarrierError
from typing import Any

from afm_pipe.distributed.launch import Launch
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.params import Params, Run
from afm_pipe.planning.measuring import update_seconds
from afm_pipe.runtime.machine import core_of_each
from afm_pipe.runtime.signals import Stopped, interrupts_blocked
from afm_pipe.study.trials import run_weight
from afm_pipe.training.engine import Engine

TRAINING_OF_POOL = 0.72  # of the pool's time in the default; the rest draws and measures samples (benchmarks/repro.md)
POOL_OF_ALL = 0.8  # of the time of all stages of the default (likewise)
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
    except (BrokenProcessPool, BrokenBarrierError):
        return (
            f"No estimate of the time: one of {workers} processes was killed, perhaps for lack of memory, or did not "
            f"start within {STARTED_WITHIN:.0f} s. If the pool fails too, set AFM_WORKERS below {workers}."
        )
    weight = run_weight(run) / run.phases[-1].until_epoch * run.batch_size / num_images  # of an update
    total = sum(weights.values()) / weight * seconds / workers / TRAINING_OF_POOL / POOL_OF_ALL
    return (
        f"About {max(total / 60, 1):.0f} minutes for all stages on this machine: {len(weights)} runs and trials, "
        f"{workers} at a time, {seconds:.2g} s for an update of {name}. What is current is not done again."
    )


def seconds_on_all(workers: int, run: Run, config: ModelConfig, launch: Launch) -> float:
    """Return the seconds of an update beside the same in other processes: cores may share what makes one fast.

    It is the harmonic mean over processes, so that `workers` divided by it is their rate together.
    """
    spawn = multiprocessing.get_context("spawn")
    cores: Sequence[int | None] = core_of_each(workers) or [None] * workers
    with ProcessPoolExecutor(workers, spawn, _start, (spawn.Barrier(workers),)) as pool:
        try:
            with interrupts_blocked():  # in the processes for good: this one ends them
                seconds = pool.map(_update_seconds, *map(repeat, (run, config, launch)), cores)
            return harmonic_mean(seconds)
        except Stopped:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_together: Any  # of a process of the pool: waits until all are ready


def _start(barrier: Any) -> None:
    global _together
    import torch

    torch.set_num_threads(1)  # as in the pool
    _together = barrier


def _update_seconds(run: Run, config: ModelConfig, launch: Launch, core: int | None) -> float:
    if core is not None:  # as in the pool
        os.sched_setaffinity(0, {core})
    _together.wait(STARTED_WITHIN)
    return update_seconds(run, config, run.batch_size, launch.torch_device(), Engine.of(launch), UPDATES)
