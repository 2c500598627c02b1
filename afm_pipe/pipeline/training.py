"""Train runs and guided runs."""

import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params, Run
from afm_pipe.params.sizes import is_small
from afm_pipe.pipeline.current import train_step
from afm_pipe.pipeline.find import model_config, open_latents, require_memory
from afm_pipe.pipeline.notices import begin_work, notice_model
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.runtime.files import atomic_path, json_value, sha256_file, write_json
from afm_pipe.runtime.lease import Lease, hold_lease
from afm_pipe.runtime.progress import track

if TYPE_CHECKING:
    import torch

    from afm_pipe.distributed.process_group import ProcessGroup
    from afm_pipe.evaluation.distance import SampleDistance
    from afm_pipe.models.model_files import ModelConfig
    from afm_pipe.objectives.base import Objective
    from afm_pipe.training.checkpoints import RetentionPolicy
    from afm_pipe.training.sharding import Parts
    from afm_pipe.training.state import Start, TrainingState
    from afm_pipe.training.store import RunStore


def train(params: Params, name: str, launch: Launch) -> None:
    """Train a run to its end, resuming an interrupted session, and write its model, curves, events and cost.

    A guided run starts from the model it continues.
    """
    step = train_step(params, name)
    if step.skip(launch):
        return

    from afm_pipe.distributed.process_group import init_distributed
    from afm_pipe.objectives import build_objective
    from afm_pipe.params.versions import run_identity
    from afm_pipe.study.trials import probes
    from afm_pipe.training.cost import run_cost
    from afm_pipe.training.curves import write_curves
    from afm_pipe.training.engine import Engine
    from afm_pipe.training.events import write_events
    from afm_pipe.training.live_log import require_loggers, row_logs
    from afm_pipe.training.trainer import Runtime, Task, Trainer

    run = params.model(name)
    require_loggers(launch)
    launch.use_threads(is_small(run.size))
    device = launch.torch_device()
    latents = open_latents(params)
    config = model_config(params, name, len(latents.classes))
    base = paths.model(params.guided[name].base) if name in params.guided else None
    if base is not None and base.name in params.imported:
        _require_imported(config, latents.spec.scaling_factor, base, name)
    start, guide, origins = _origin(params, name, run, list(latents.classes), device)
    identity = run_identity(run, params.latent_shape, latents.fingerprint(), origins)
    objective = build_objective(run, config, guide)
    if start is not None and base is not None:
        _require_base(start, objective, base)
    keep_at = probes(run, latents.num_images, continues=start is not None)  # as a trial of a table would
    work_dir = paths.WORK / name
    with init_distributed(device) as group, hold_lease(work_dir) if group.is_main_process else nullcontext() as lease:
        require_memory(params, name, launch, device, group.world_size)
        group.barrier()  # every process checks its memory before any allocates
        retention = _retention(launch, run, latents.num_images, lease)
        measure = _measure(params, run, list(latents.classes), device, group)
        task = Task(objective, latents, identity, start, keep_at, measure)
        trainer = Trainer(
            task,
            Runtime(
                work_dir / identity,
                device,
                launch.checkpoint_seconds,
                group,
                launch.micro_batch,
                retention,
                Engine.of(launch),
            ),
        )
        if lease is None:
            track(f"train {name}", trainer.train())
            return
        code = begin_work(work_dir / identity, "train")
        trainer.callbacks += row_logs(trainer, name, identity, launch, run.model_dump(mode="json"))
        try:
            trained = track(f"train {name}", trainer.train())
        except NotFiniteError as error:
            _log_failure(trainer.store, error, run.batch_size)
            raise
        for note in trained.notes:
            print(note)
        lease.check()
        description = {
            "model": objective.describe(),
            "name": name,
            "run": run.model_dump(),
            "classes": list(latents.classes),
            "scaling_factor": latents.spec.scaling_factor,
            "provenance": {"fingerprint": identity, "code": code, "latents": latents.provenance, **origins},
            "selection": None if trainer.selection is None else trainer.selection.describe(),
            "updates": trained.state.update,
            "images_seen": trained.state.update * run.batch_size,
        }
        _write_model(name, run, latents.num_images, trained.state, trainer.store, description)
        write_curves(paths.curves(name), trained.state.rows, objective.columns())
        write_events(paths.events(name), trainer.store.read_events())
        own_updates = trained.state.update - (start.update if start else 0)
        cost = run_cost(own_updates, run.batch_size, trained.state.seconds, device, group.world_size)
        write_json(paths.costs(name), cost | {"code": code})
        step.record()


def _retention(launch: Launch, run: Run, num_images: int, lease: Lease | None) -> "RetentionPolicy":
    from afm_pipe.objectives.schedules import update_at
    from afm_pipe.training.checkpoints import RetentionPolicy

    epochs = launch.keep_every_epochs
    every = None if epochs is None else max(update_at(run, epochs, num_images), 1)
    policy = RetentionPolicy(launch.keep_checkpoints, every=every, best=launch.keep_best)
    return policy if lease is None else policy._replace(check_lease=lease.check)


def _measure(
    params: Params, run: Run, classes: list[str], device: "torch.device", group: "ProcessGroup"
) -> "SampleDistance | None":
    """Return the distance that selects the best EMA, for a run with selection."""
    from afm_pipe.autoencoders import load_autoencoder
    from afm_pipe.evaluation.distance import SampleDistance

    if run.selection is None:
        return None
    autoencoder = load_autoencoder(params, paths.AUTOENCODER, device)
    return SampleDistance(params, paths.REFERENCE, autoencoder, classes, run.selection.samples, device, group)


def _log_failure(store: "RunStore", error: NotFiniteError, batch_size: int) -> None:
    """Log the event that ended a run, unless its monitor has."""
    from afm_pipe.training.events import FATAL, Event

    known = store.read_events()
    if not known or (known[-1].update, known[-1].kind in FATAL) != (error.update, True):
        store.append_event(Event(error.update, error.update * batch_size, "not_finite", str(error)))


def guide(params: Params, name: str, launch: Launch) -> None:
    """Train a guided run. Raises UserError for any other name."""
    if name not in params.guided:
        known = ", ".join(params.guided) or "none"
        raise UserError(f"Found no guided run {name!r} in params, expected one of {known}.")
    train(params, name, launch)


def _origin(
    params: Params, name: str, run: Run, classes: list[str], device: "torch.device"
) -> tuple["Start | None", "torch.nn.Module | None", dict[str, str]]:
    """Return what a run begins from and is guided by, if anything, and the hashes of those.

    Raises UserError where they know other classes.
    """
    from afm_pipe.data.classes import require_same_classes
    from afm_pipe.models.classifier import load_latent_classifier
    from afm_pipe.models.model_files import load_tensors
    from afm_pipe.params.versions import origin_files
    from afm_pipe.training.state import Start

    files, start, guide = origin_files(params, name), None, None
    if name in params.guided:
        base = paths.model(params.guided[name].base)
        updates = json_value(base / "config.json", "updates")
        if base.name in params.runs and (type(updates) is not int or updates < 1):
            raise UserError(f"Found {base / 'config.json'} without its number of updates: train {base.name} again.")
        require_same_classes(json_value(base / "config.json", "classes"), base / "config.json", classes, paths.LATENTS)
        notice_model(base)
        networks: Parts = {part: load_tensors(files[part]) for part in ("generator", "discriminator") if part in files}
        start = Start(networks, 0 if params.guided[name].begins_anew else updates)
    if run.guided:
        guide = load_latent_classifier(paths.CLASSIFIER, device, classes)
        notice_model(paths.CLASSIFIER)
    return start, guide, {part: sha256_file(file) for part, file in files.items()}


def _require_imported(config: "ModelConfig", scaling_factor: float | None, folder: Path, name: str) -> None:
    """Raise UserError naming the first difference between imported weights and the run that continues them."""
    from afm_pipe.models.model_files import load_config
    from afm_pipe.models.released import describe

    found, factor = load_config(folder), json_value(folder / "config.json", "scaling_factor")
    assert config.velocity is not None, "params have checked the objective"
    if found.velocity is None:
        raise UserError(
            f"Found {folder} ({describe(found)}), expected the velocity of an ODE for guided.{name}, such as SiT's "
            "weights: import those."
        )
    labels = [config.num_classes + each.unconditional for each in (found.velocity, config.velocity)]  # of equal classes
    own, data = scaling_factor or 1.0, "use the data and the autoencoder of these weights"
    factor = own if not factor or math.isclose(factor, own, rel_tol=1e-6) else factor  # some weights know none
    for what, theirs, expected, remedy in (
        ("size", found.size, config.size, f"set size in guided.{name}.run"),
        ("qk_norm", found.qk_norm, config.qk_norm, f"set qk_norm in guided.{name}.run"),
        ("latents", found.latent_shape, config.latent_shape, data),
        ("scaling factor", factor, own, data),
        ("labels", *labels, "set flow.label_dropout above 0 for weights with a label of no class, else to 0"),
    ):
        if theirs != expected:
            raise UserError(f"Found {folder} with {what} {theirs}, expected {expected} as in guided.{name}: {remedy}.")


def _require_base(start: "Start", objective: "Objective", folder: Path) -> None:
    """Raise UserError if the networks of a run's base differ from the run's own, or one is missing."""
    import torch

    from afm_pipe.models.model_files import require_match

    weights = objective.continued(start.networks)
    with torch.device("meta"):
        for part, network in objective.build_networks().items():
            require_match(network, weights.get(part, {}), folder / f"{part}.safetensors")


def _write_model(
    name: str, run: Run, num_images: int, state: "TrainingState", store: "RunStore", description: dict[str, Any]
) -> None:
    from afm_pipe.models.model_files import save_model
    from afm_pipe.objectives.schedules import update_at

    with atomic_path(paths.model(name)) as folder:
        save_model(folder, {**state.networks, state.sampled: state.ema}, description)
        for epoch in run.keep_discriminators:
            kept = store.adversary(update_at(run, epoch, num_images), "epoch")
            shutil.copyfile(kept, folder / f"{paths.kept_discriminator(epoch)}.safetensors")
