"""Train and measure the cells of tables, several at a time, each in a process of one thread.

A diverged cell is a result like any other. What tells it from one that has not come far: a loss that is not finite, a
distance to the data at the end that is above the one at a third of the updates, their intervals apart, or an end with
hardly more samples in the class asked for than chance gives (study.collapsed).
"""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cached_property
from typing import Any

import psutil
import torch
from torch import nn

from afm_pipe.autoencoders import load_autoencoder
from afm_pipe.data.latents import Latents
from afm_pipe.evaluation.measures import sample_suffix
from afm_pipe.evaluation.metrics import Evaluator, evaluate_run
from afm_pipe.evaluation.networks import NAMES
from afm_pipe.models.classifier import load_latent_classifier
from afm_pipe.models.flow import Flow
from afm_pipe.models.model_files import (
    ModelConfig,
    build_generator,
    load_exactly,
    load_tensors,
    run_config,
    save_tensors,
)
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params
from afm_pipe.runtime import paths, signals
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.runtime.files import read_json, sha256_file, write_json
from afm_pipe.runtime.lease import hold_lease
from afm_pipe.runtime.progress import Progress, finish
from afm_pipe.study.trials import Trial, Units
from afm_pipe.training.checkpoints import RetentionPolicy
from afm_pipe.training.cost import training_cost
from afm_pipe.training.events import as_json
from afm_pipe.training.state import Start
from afm_pipe.training.store import RunStore
from afm_pipe.training.trainer import Runtime, Task, Trainer

TRAINED = "trained.json"  # in a cell's folder, once its training is over


def run_jobs(
    params: Params, jobs: Sequence[Trial], device: torch.device, workers: int, checkpoint_seconds: float, units: Units
) -> Generator[Progress, None, None]:
    """Train and measure what is missing, first what others continue, whole seeds one after the other.

    Raises UserError as a cell does.
    """
    missing = sorted((job for job in jobs if not job.result.is_file()), key=lambda job: job.cell.seed)
    bases = [job.base for job in missing if job.base is not None and not (job.base.folder / TRAINED).is_file()]
    rounds = [[job for job in missing if job.base is None] + bases, [job for job in missing if job.base is not None]]
    total = len({job.measurement for job in rounds[0] + rounds[1]})
    done = 0
    common = (params, device, checkpoint_seconds, units)
    yield Progress(done, total, "trials")
    for each in rounds:
        groups = _by_training(each)
        if workers == 1 or len(groups) <= 1:
            worker = Worker(*common)
            for group in groups:
                worker.run(group)
                done += len(group)
                yield Progress(done, total, "trials", _label(group[0]))
            continue
        spawn = multiprocessing.get_context("spawn")
        stopping = spawn.Event()
        beginning = (os.getpid(), stopping, *common)
        pool = ProcessPoolExecutor(min(workers, len(groups)), spawn, _begin_worker, beginning)
        try:
            futures = {pool.submit(_run_group, group): group for group in groups}
            for future in as_completed(futures):
                future.result()
                done += len(futures[future])
                yield Progress(done, total, "trials", _label(futures[future][0]))
        except signals.Stopped:
            stopping.set()  # for workers between two cells
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class Worker:
    """Trains and measures cells, one after the other; the data and what it measures with are loaded once."""

    def __init__(self, params: Params, device: torch.device, checkpoint_seconds: float, units: Units) -> None:
        self.params, self.device, self.checkpoint_seconds, self.units = params, device, checkpoint_seconds, units

    @cached_property
    def latents(self) -> Latents:
        """What is trained on."""
        return Latents.open(paths.LATENTS, self.params, sha256_file(paths.AUTOENCODER_WEIGHTS))

    @cached_property
    def evaluator(self) -> Evaluator:
        """What is measured with."""
        evaluate = self.params.evaluate.model_copy(update={"samples": self.params.study.samples})
        return Evaluator(self.params.model_copy(update={"evaluate": evaluate}), paths.REFERENCE, self.device)

    @cached_property
    def autoencoder(self) -> Any:
        """What decodes samples."""
        return load_autoencoder(self.params, paths.AUTOENCODER, self.device)

    def run(self, group: Sequence[Trial]) -> None:
        """Train the one training of a group of cells, and measure each of them."""
        trained = self.train(group[0])
        for job in group:
            if job.measurement != job.training:  # else it is a base, wanted for its weights alone
                write_json(job.result, self.measure(job, trained))

    def train(self, job: Trial) -> dict[str, Any]:
        """Train a cell, unless that was done; keep its moving averages at the probes, and its last D."""
        record, run = job.folder / TRAINED, job.cell.run
        with hold_lease(job.folder if job.owner is None else job.folder.parent) as lease:
            if record.is_file():
                return read_json(record)
            config, (start, guide) = self._config(job), self._origin(job)
            objective = build_objective(run, config, guide)
            task = Task(objective, self.latents, job.training, start, job.probes(self.latents.num_images))
            retention = RetentionPolicy(own=lease.check)
            trainer = Trainer(task, Runtime(job.folder, self.device, self.checkpoint_seconds, retention=retention))
            try:
                state = finish(trainer.train()).state
                updates, seconds, not_finite = state.update, state.seconds["training"], None
                save_tensors(job.folder / "discriminator.safetensors", state.networks["discriminator"].state_dict())
            except NotFiniteError as error:
                updates, seconds, not_finite = error.update, None, error.update
            lease.check()
            updates -= start.update if start else 0
            cost = training_cost(updates, run.batch_size, seconds, self.device)
            cost["units"] = self.units(self.params, job.cell.base, run, config)
            events = as_json(trainer.store.read_events())
            trained = {"cost": cost, "not_finite": not_finite, "events": events}
            write_json(record, trained)
            if job.owner is None:
                shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        return trained

    def measure(self, job: Trial, trained: dict[str, Any]) -> dict[str, Any]:
        """Measure a cell at every probe it reached; return its result."""
        measured: list[dict[str, Any]] = []
        protocol: dict[str, Any] = {}
        for update, phase in job.probes(self.latents.num_images).items():
            if not RunStore(job.folder).kept(update).is_file():
                break  # it diverged before
            metrics = self._metrics(job, update)
            protocol, intervals = metrics.pop("protocol"), metrics.pop("intervals")
            epoch = update * job.cell.run.batch_size / self.latents.num_images
            measured.append(
                {"update": update, "epoch": epoch, "phase": phase, "metrics": metrics, "intervals": intervals}
            )
        finite = trained["not_finite"] is None
        return {
            "fingerprint": job.measurement,
            "settings": job.cell.run.model_dump(mode="json"),
            "diverged": diverged(trained["not_finite"], measured, self._distance_key, self.params.study.collapsed),
            "probes": measured,
            "metrics": measured[-1]["metrics"] if finite else {},
            "intervals": measured[-1]["intervals"] if finite else {},
            "cost": trained["cost"],
            "events": trained["events"],
            "protocol": protocol,
        }

    def _metrics(self, job: Trial, update: int) -> dict[str, Any]:
        config, weights = self._config(job), RunStore(job.folder).kept(update)
        generator = build_generator(config)
        load_exactly(generator, load_tensors(weights), weights)
        generator = generator.to(self.device).eval().requires_grad_(False)
        flow = Flow(generator, config.form, job.cell.steps or config.nfe)
        told = {"weights": "EMA", "autoencoder_sha256": sha256_file(paths.AUTOENCODER_WEIGHTS)}
        measuring = evaluate_run(
            self.evaluator.params,
            flow,
            self.autoencoder,
            paths.REFERENCE,
            told,
            self.device,
            evaluator=self.evaluator,
        )
        metrics, _ = finish(measuring)
        return metrics

    def _origin(self, job: Trial) -> tuple[Start | None, nn.Module | None]:
        """Return what a cell continues, if anything, and what guides it. Raises UserError when its base diverged."""
        base = job.base
        guide = load_latent_classifier(paths.CLASSIFIER, self.device) if job.cell.run.guided else None
        if base is None:
            return None, guide
        if read_json(base.folder / TRAINED)["not_finite"] is not None:
            raise UserError(f"Found the base of the cell {_label(job)} diverged, expected one to continue: change it.")
        update = max(base.probes(self.latents.num_images))
        generator = RunStore(base.folder).load_kept(update)
        discriminator = load_tensors(base.folder / "discriminator.safetensors")
        return Start({"generator": generator, "discriminator": discriminator}, update), guide

    def _config(self, job: Trial) -> ModelConfig:
        return run_config(job.cell.run, self.params.latent_shape, self.latents.num_classes)

    @property
    def _distance_key(self) -> str:
        return f"{NAMES[self.params.evaluate.features[0]].distance}{sample_suffix(self.params.study.samples)}"


def diverged(not_finite: int | None, measured: Sequence[dict[str, Any]], key: str, collapsed: float) -> str | None:
    """Say how a cell diverged, None where it did not: the rule of this module."""
    if not_finite is not None:
        return f"a loss that is not finite at update {not_finite}"
    right = measured[-1]["metrics"].get("class_accuracy") if measured else None
    if right is not None and right <= collapsed:
        return f"collapsed: {right:.0%} of its samples are of the class asked for"
    if len(measured) > 1:
        third, end = (probe["intervals"][key] for probe in (measured[0], measured[-1]))
        if end[0] > third[1]:
            return "worse at three times the updates"
    return None


def _by_training(jobs: Sequence[Trial]) -> list[list[Trial]]:
    """Group cells that share a training, bases left out where a cell of its own trains them."""
    groups: dict[str, dict[str, Trial]] = {}
    for job in jobs:
        groups.setdefault(job.training, {})[job.measurement] = job
    return [list(group.values()) for group in groups.values()]


def _label(job: Trial) -> str:
    return " x ".join(filter(None, (job.cell.row, job.cell.column))) + f", seed {job.cell.seed}"


_worker: Worker  # of a process of the pool
_stopping: Any  # the pool's event: no more cells are wanted


def _begin_worker(
    parent: int, stopping: Any, params: Params, device: torch.device, checkpoint_seconds: float, units: Units
) -> None:
    global _worker, _stopping
    signals.ignore()
    signals.stop_with([psutil.Process(parent)])  # nobody would take this process's work
    torch.set_num_threads(1)
    _worker, _stopping = Worker(params, device, checkpoint_seconds, units), stopping


def _run_group(group: Sequence[Trial]) -> None:
    with signals.graceful_shutdown():
        if _stopping.is_set():
            raise signals.Stopped(signal.SIGTERM)
        _worker.run(group)
