"""Train and measure trials, several at a time, each in a process with one thread.

Any number of processes, on any machines that share work/, may run the same study: a trial belongs to the process that
holds the lease of its folder, and another takes it over if that process ends early. A trial that diverges
(`statistics.divergence`) is a result like any other.
"""

import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from afm_pipe.autoencoders import load_autoencoder
from afm_pipe.data.latents import Latents
from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.pool import run_jobs
from afm_pipe.evaluation.distance import SampleDistance
from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.evaluation.measures import sample_suffix
from afm_pipe.evaluation.networks import METRIC_NAMES
from afm_pipe.models.classifier import load_latent_classifier
from afm_pipe.models.model_files import (
    ModelConfig,
    build_generator,
    build_sampler,
    load_exactly,
    load_tensors,
    run_config,
    save_tensors,
)
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params, Run
from afm_pipe.params.sizes import is_small
from afm_pipe.params.versions import code_record, recorded_code
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.runtime.files import read_json, sha256_file, write_json
from afm_pipe.runtime.lease import HeldError, Lease, hold_lease, holder_of
from afm_pipe.runtime.progress import Progress, finish, track
from afm_pipe.sampling.sampler import Sampler
from afm_pipe.study.statistics import divergence
from afm_pipe.study.trials import Trial, run_weight
from afm_pipe.training.checkpoints import RetentionPolicy
from afm_pipe.training.cost import training_cost
from afm_pipe.training.engine import Engine
from afm_pipe.training.state import Start
from afm_pipe.training.store import RunStore
from afm_pipe.training.trainer import Runtime, Task, Trainer

TRAINED, DISCRIMINATOR = "trained.json", "discriminator.safetensors"  # in the folder of a trained trial
Units = Callable[[Params, Run, Run, ModelConfig], float]
"""Counts the cost of an update in forward passes of G: (params, base run, run, model) -> units."""


def run_trials(
    params: Params, trials: Sequence[Trial], launch: Launch, units: Units
) -> Generator[Progress, None, None]:
    """Train and measure the missing trials, seed by seed; end when none is missing, whoever has trained it.

    Raises UserError if a trial does.
    """
    return run_jobs(trial_jobs(trials), Worker(params, launch, units), launch.num_workers(), "trials")


class TrialJob(NamedTuple):
    """A training run, and the measurements of the trials that share it."""

    group: Sequence[Trial]

    def __str__(self) -> str:
        return str(self.group[0].spec.place)

    @property
    def weight(self) -> float:
        """Estimated work."""
        return run_weight(self.group[0].run, self.group[0].base is not None)

    @property
    def is_done(self) -> bool:
        """Whether the run is trained and its trials are measured."""
        return all(_is_trained(trial) if trial.measurement is None else trial.result.is_file() for trial in self.group)

    @property
    def is_ready(self) -> bool:
        """Whether its base is trained, and no other process seems to hold it."""
        base = self.group[0].base
        return self.holder is None and (base is None or _is_trained(base))

    @property
    def holder(self) -> str | None:
        """The other process that seems to train it, if any."""
        trial = self.group[0]
        held = [trial.folder] if trial.owner is None else [trial.folder, trial.folder.parent]
        return next(filter(None, map(holder_of, held)), None)

    def run(self, context: "Worker") -> bool:
        """Train and measure."""
        return context.run(self.group)


def trial_jobs(trials: Sequence[Trial]) -> list[TrialJob]:
    """Return the missing trials and bases, grouped by the training run they share; bases come first, then by seed."""
    missing = sorted((trial for trial in trials if not trial.result.is_file()), key=lambda trial: trial.spec.place.seed)
    bases = [trial.base for trial in missing if trial.base and not _is_trained(trial.base)]
    alone = [trial for trial in missing if trial.base is None]
    ordered = [*alone, *bases, *(trial for trial in missing if trial.base is not None)]
    return [TrialJob(group) for group in _by_training(ordered)]


def _is_trained(trial: Trial) -> bool:
    return (trial.folder / TRAINED).is_file()


class Worker:
    """Trains and measures trials one by one; loads data and networks once."""

    def __init__(self, params: Params, launch: Launch, units: Units) -> None:
        self.params, self.launch, self.units = params, launch, units

    @cached_property
    def device(self) -> torch.device:
        """The device to train on."""
        return self.launch.torch_device()

    @cached_property
    def latents(self) -> Latents:
        """The training data."""
        return Latents.open(paths.LATENTS, self.params, sha256_file(paths.AUTOENCODER_WEIGHTS))

    @cached_property
    def evaluator(self) -> Evaluator:
        """The reference and feature networks."""
        evaluate = self.params.evaluate.model_copy(update={"samples": self.params.study.samples})
        return Evaluator(self.params.model_copy(update={"evaluate": evaluate}), paths.REFERENCE, self.device)

    @cached_property
    def autoencoder(self) -> Any:
        """The decoder of samples."""
        return load_autoencoder(self.params, paths.AUTOENCODER, self.device)

    def run(self, group: Sequence[Trial]) -> bool:
        """Train the run that a group of trials shares, and measure each trial; return False if another process does."""
        self.launch.use_threads(is_small(group[0].run.size))  # a worker of a pool has one already
        if any(trial.measurement is not None for trial in group):
            self.evaluator.require_classes(self.latents.classes, paths.LATENTS)  # before anything is trained
        try:
            with hold_lease(group[0].folder) as lease:
                trained = self.train(group[0], lease)
                for trial in group:
                    if trial.measurement is not None and not trial.result.is_file():
                        result = self.measure(trial, trained)
                        lease.check()
                        write_json(trial.result, result)
        except HeldError:
            return False
        return True

    def train(self, trial: Trial, held: Lease) -> dict[str, Any]:
        """Train a trial if it is not trained yet; keep its EMA at the probes, and its last D."""
        record, run = trial.folder / TRAINED, trial.run
        with nullcontext(held) if trial.owner is None else hold_lease(trial.folder.parent) as lease:
            if record.is_file():
                return read_json(record)
            begun = recorded_code(trial.folder, "train")
            config, (start, guide) = self._config(trial), self._origin(trial)
            objective = build_objective(run, config, guide)
            keep_at, measure = trial.probes(self.latents.num_images), self._selection(trial)
            task = Task(objective, self.latents, trial.training, start, keep_at, measure)
            retention, seconds = RetentionPolicy(check_lease=lease.check), self.launch.checkpoint_seconds
            engine = Engine.of(self.launch)._replace(shard=False)  # a trial has one process
            size = self.launch.micro_batch
            runtime = Runtime(trial.folder, self.device, seconds, micro_batch=size, retention=retention, engine=engine)
            trainer = Trainer(task, runtime)
            try:
                state = track(f"trial {trial.spec.place}", trainer.train()).state
                update, elapsed, not_finite = state.update, state.seconds["training"], None
                if "discriminator" in state.networks:
                    save_tensors(trial.folder / DISCRIMINATOR, state.networks["discriminator"].state_dict())
            except NotFiniteError as error:
                update, elapsed, not_finite = error.update, None, error.update
            lease.check()
            cost = training_cost(update - (start.update if start else 0), run.batch_size, elapsed, self.device)
            cost["units"] = self.units(self.params, trial.spec.base, run, config)
            cost["total_units"] = cost["units"] * cost["updates"] + self._base_units(trial)
            events = [asdict(event) for event in trainer.store.read_events()]
            trained = {"cost": cost, "code": begun, "not_finite": not_finite, "events": events}
            write_json(record, trained)
            if trial.owner is None:
                shutil.rmtree(trainer.store.checkpoints, ignore_errors=True)
        return trained

    def _selection(self, trial: Trial) -> SampleDistance | None:
        """Return the distance that selects the EMA of the run that a trial is, if it does: the run finds it done."""
        selection = trial.run.selection
        if selection is None or trial.owner is None:
            return None
        classes = list(self.latents.classes)
        return SampleDistance(self.params, paths.REFERENCE, self.autoencoder, classes, selection.samples, self.device)

    def measure(self, trial: Trial, trained: dict[str, Any]) -> dict[str, Any]:
        """Measure a trial at every probe it reached; return its result."""
        measured: list[dict[str, Any]] = []
        protocol: dict[str, Any] = {}
        for update, phase in trial.probes(self.latents.num_images).items():
            if not RunStore(trial.folder).kept(update).is_file():
                break  # it diverged before this probe
            metrics = self._metrics(trial, update)
            protocol, intervals = metrics.pop("protocol"), metrics.pop("intervals")
            epoch = update * trial.run.batch_size / self.latents.num_images
            measured.append(
                {"update": update, "epoch": epoch, "phase": phase, "metrics": metrics, "intervals": intervals}
            )
        end = measured[-1] if trained["not_finite"] is None else {"metrics": {}, "intervals": {}}
        return {
            "fingerprint": trial.measurement,
            "settings": trial.run.model_dump(mode="json"),
            "diverged": divergence(trained["not_finite"], measured, self._distance_key, self.params.study.collapsed),
            "nfe": self._measured_config(trial).nfe,
            "probes": measured,
            "metrics": end["metrics"],
            "intervals": end["intervals"],
            "cost": trained["cost"],
            "code": code_record("table") | trained["code"],
            "events": trained["events"],
            "protocol": protocol,
        }

    def _metrics(self, trial: Trial, update: int) -> dict[str, Any]:
        weights = RunStore(trial.folder).kept(update)
        generator = build_generator(self._config(trial))
        load_exactly(generator, load_tensors(weights), weights)
        generator = generator.to(self.device).eval().requires_grad_(False)
        flow = build_sampler(generator, self._measured_config(trial))
        shape, size = self.params.latent_shape, self.params.sample.micro_batch
        sampler = Sampler(flow, self.autoencoder, shape, self.latents.classes, size, self.device)
        provenance = {"weights": "EMA", "autoencoder_sha256": sha256_file(paths.AUTOENCODER_WEIGHTS)}
        metrics = finish(self.evaluator.evaluate(sampler, provenance))
        assert metrics is not None, "a single process is the main process"
        return metrics

    def _origin(self, trial: Trial) -> tuple[Start | None, nn.Module | None]:
        """Return the state that a trial continues and its guide, if any. Raises UserError if its base diverged."""
        base = trial.base
        classes = self.latents.classes
        guide = load_latent_classifier(paths.CLASSIFIER, self.device, classes) if trial.run.guided else None
        if base is None:
            return None, guide
        if read_json(base.folder / TRAINED)["not_finite"] is not None:
            raise UserError(
                f"Found that the base of trial {trial.spec.place} diverged, expected weights to continue from: change "
                "study.base, or remove the table."
            )
        update = max(base.probes(self.latents.num_images))
        networks = {"generator": RunStore(base.folder).load_kept(update)}
        if (base.folder / DISCRIMINATOR).is_file():
            networks["discriminator"] = load_tensors(base.folder / DISCRIMINATOR)
        return Start(networks, trial.first_update(self.latents.num_images)), guide

    def _base_units(self, trial: Trial) -> float:
        """Return what training the base of a trial cost, in forward passes of G; 0 without a base."""
        if trial.base is None:
            return 0.0
        cost = read_json(trial.base.folder / TRAINED)["cost"]
        return float(cost["units"] * cost["updates"])

    def _config(self, trial: Trial) -> ModelConfig:
        return run_config(trial.run, self.params.latent_shape, self.latents.num_classes)

    def _measured_config(self, trial: Trial) -> ModelConfig:
        """Return the config of a trial's model with the steps and the sampling with which it is measured."""
        config, spec = self._config(trial), trial.spec
        if config.velocity is None:
            return config.model_copy(update={"nfe": spec.steps or config.nfe})
        if spec.sampling is None:
            return config
        velocity = config.velocity.model_copy(update=spec.sampling.model_dump())
        return config.model_copy(update={"velocity": velocity, "nfe": spec.sampling.passes()})

    @property
    def _distance_key(self) -> str:
        return f"{METRIC_NAMES[self.params.evaluate.features[0]].distance}{sample_suffix(self.params.study.samples)}"


def _by_training(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Group trials that share a training run; a base is dropped if a measured trial trains the same run."""
    groups: dict[str, dict[str | None, Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.training, {}).setdefault(trial.measurement, trial)
    for group in groups.values():
        if len(group) > 1:
            group.pop(None, None)
    return [list(group.values()) for group in groups.values()]
