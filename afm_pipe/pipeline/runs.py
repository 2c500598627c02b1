"""Stages of a trained model: import, export, sample, evaluate."""

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from afm_pipe.distributed.launch import Launch
from afm_pipe.params import RESERVED_NAMES, Imported, Params
from afm_pipe.params.base import NAME, NAME_RULE
from afm_pipe.pipeline.current import evaluate_step, sample_step
from afm_pipe.pipeline.find import find_model, load_sampler
from afm_pipe.pipeline.notices import begin_work
from afm_pipe.runtime import paths
from afm_pipe.runtime.environment import env_rank
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, json_value, read_json, sha256_file, write_json
from afm_pipe.runtime.lease import hold_lease
from afm_pipe.runtime.progress import alive, track

if TYPE_CHECKING:
    from afm_pipe.sampling.requests import Request, SamplingResult

STRIP_ROWS, STRIP_FRAMES = 5, 5  # of interpolation.png: classes, and frames from one seed to the next


def import_weights(params: Params, name: str, settings: Imported | None = None) -> None:
    """Convert external weights, described by `settings` or by `imported` in params, into models/NAME."""
    from afm_pipe.models.released import describe, import_generator

    settings = settings or params.imported.get(name)
    if settings is None:
        raise UserError(f"Found no {name!r} under imported in params, expected one of {', '.join(params.imported)}.")
    if name in {*params.runs, *params.guided, *RESERVED_NAMES}:
        raise UserError(f"Found the name {name[:80]!r}, which is taken: choose another.")
    if re.fullmatch(NAME, name) is None:
        raise UserError(f"Found the name {name[:80]!r}, {NAME_RULE}.")
    imported = json_value(paths.model(name) / "config.json", "provenance", "imported")
    if paths.model(name).exists() and not isinstance(imported, dict):
        raise UserError(f"Found {paths.model(name)}, which was not imported: choose another name, or move it away.")
    with alive(f"import {name}"):
        config = import_generator(settings, paths.model(name))
    entry = json_value(paths.model(name) / "config.json", "provenance", "imported", "entry")
    print(f"{paths.model(name)}: {describe(config)}, from {entry}.")


def export(name: str, kind: str, out: Path, params: Params | None = None) -> None:
    """Write a model in another format: released, safetensors or diffusers, with a model card that has its metrics."""
    from afm_pipe.models.exports import export as write_export

    folder, card = find_model(name), ""
    if kind == "diffusers" and paths.AUTOENCODER_WEIGHTS.is_file():
        from afm_pipe.reporting.model_card import model_card_sections

        hashes = sha256_file(folder / "generator.safetensors"), sha256_file(paths.AUTOENCODER_WEIGHTS)
        card = model_card_sections(name, *hashes, params)
    write_export(folder, paths.AUTOENCODER, kind, out, card)
    print(f"{out}: {name} as {kind}.")


def export_samples(params: Params, name: str, launch: Launch, out: Path) -> None:
    """Write the samples that evaluation measures as one npz in random order, for ADM's evaluator."""
    if _draw(params, name, launch, [_measured(params, name, adm_npz=out)]):
        print(f"{out}: {params.evaluate.samples} samples of {name}, shuffled, for ADM's evaluator.")


def sample(params: Params, name: str, launch: Launch, request: "Request | None" = None) -> None:
    """Draw the requested samples, by default the report's pictures of a model.

    These are a grid (the first classes in rows, the same seeds for every model), interpolations between seeds and, with
    sample.keep_images, the images that `evaluate` measures.
    """
    if request:
        if drawn := _draw(params, name, launch, [request]):
            print(drawn.describe())
        return
    step = sample_step(params, name)
    if step.skip(launch):
        return

    from afm_pipe.sampling.requests import Request

    settings, folder = params.sample, paths.samples(name)
    seeds = ",".join(str(settings.seed + i) for i in range(3))
    requests = [
        Request(grid=folder / "grid.png"),
        Request(interpolate=seeds, rows=STRIP_ROWS, frames=STRIP_FRAMES, grid=folder / "interpolation.png"),
    ]
    if settings.keep_images:
        requests.append(_measured(params, name, images=folder / "images"))
    if _draw(params, name, launch, requests):
        step.record()


def _measured(params: Params, name: str, adm_npz: Path | None = None, images: Path | None = None) -> "Request":
    """Request the samples that evaluation measures, in the class shares of the reference.

    Raises UserError for a reference of other classes.
    """
    from afm_pipe.data.classes import require_same_classes
    from afm_pipe.evaluation.reference import SUMMARY
    from afm_pipe.sampling.requests import Request

    path, model, counts = paths.REFERENCE / SUMMARY, find_model(name), None
    if path.is_file():
        summary = read_json(path)
        require_same_classes(read_json(model / "config.json").get("classes"), model, summary["classes"], path)
        counts = summary.get("class_counts")
    elif env_rank() == 0:
        print(f"Not checked: whether the real images have equal class shares, as these samples; there is no {path}.")
    settings = params.evaluate
    return Request(count=settings.samples, seed=settings.seed, class_counts=counts, adm_npz=adm_npz, images=images)


def _draw(params: Params, name: str, launch: Launch, requests: "list[Request]") -> "SamplingResult | None":
    """Draw samples of a model; the main process returns the last result."""
    from afm_pipe.distributed.process_group import init_distributed
    from afm_pipe.sampling.requests import check_request, draw

    for request in requests:
        check_request(request)
    launch.use_threads(params.data.is_small)
    device = launch.torch_device()
    with init_distributed(device) as group:
        sampler = load_sampler(params, name, device, group)
        for request in requests:
            drawn = track(f"sample {name}", draw(sampler, request, params.sample))
        if group.is_main_process and params.autoencoder.decoder:
            print(f"{name}: decoded by {params.autoencoder.decoder}.")
    return drawn


def evaluate(params: Params, name: str, launch: Launch) -> None:
    """Measure a run's samples against the reference."""
    step = evaluate_step(params, name)
    if step.skip(launch):
        return

    from afm_pipe.distributed.process_group import init_distributed
    from afm_pipe.evaluation.evaluator import Evaluator
    from afm_pipe.params.versions import versions
    from afm_pipe.runtime.identity import fingerprint

    launch.use_threads(params.data.is_small)
    device = launch.torch_device()
    with init_distributed(device) as group:
        sampler = load_sampler(params, name, device, group)
        if sampler.latent_shape != params.latent_shape:
            raise UserError(
                f"Found {paths.model(name)} on latents {sampler.latent_shape}, expected {params.latent_shape}, as data "
                "and autoencoder in params make them: evaluate it with its own data."
            )
        described = read_json(paths.model(name) / "config.json")
        provenance = {
            "run": name,
            "nfe": sampler.generator.nfe,
            "weights": "EMA",
            "images_seen": described["images_seen"],
            "generator_sha256": sha256_file(paths.model(name) / "generator.safetensors"),
            "autoencoder_sha256": sha256_file(paths.AUTOENCODER_WEIGHTS),
        } | ({"decoder": params.autoencoder.decoder} if params.autoencoder.decoder else {})
        evaluator = Evaluator(params, paths.REFERENCE, device)
        evaluator.require_classes(sampler.class_names, paths.model(name))
        if json_value(paths.model(name) / "config.json", "provenance", "imported", "classes_named_by") == "numbers":
            evaluator.require_classes(None, paths.model(name))
        measured = {
            "provenance": provenance,
            "model": described["model"],  # its form and repeats do not show in the weights
            "evaluate": params.evaluate.model_dump(),
            "micro_batch": params.sample.micro_batch,
            "device": str(device),
        }
        hashes = {reference.name: reference.sha256 for reference in evaluator.references}
        hashes |= {"thumbnails": sha256_file(paths.REFERENCE / "thumbnails.npz")}
        identity = fingerprint(measured, hashes, versions("evaluate"))
        work_dir = paths.WORK / name / "evaluate"
        with hold_lease(work_dir) if group.is_main_process else nullcontext() as lease:
            if lease is not None:
                provenance["code"] = begin_work(work_dir / identity, "evaluate")
            seconds = 60.0 if launch.checkpoint_seconds is None else launch.checkpoint_seconds
            run = evaluator.evaluate(sampler, provenance, work_dir / identity, seconds)
            metrics = track(f"evaluate {name}", run)
            if lease is None or metrics is None:
                return
            picture = evaluator.nearest(sampler)
            lease.check()
            write_json(paths.metrics(name), metrics)
            with atomic_path(paths.samples(name) / "nearest.png") as temp:
                picture.save(temp, format="png")
            step.record()
            shutil.rmtree(work_dir / identity, ignore_errors=True)  # last: until then the same command resumes
