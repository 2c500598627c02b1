"""What is done with a model: it is brought in, written for others, sampled and measured."""

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afm_pipe.distributed.launch import Launch
from afm_pipe.params import RESERVED_NAMES, Imported, Params, valid_name
from afm_pipe.pipeline.find import find_model, load_sampler
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_json, sha256_file, write_json
from afm_pipe.runtime.lease import hold_lease
from afm_pipe.runtime.progress import Progress, track

if TYPE_CHECKING:
    import torch

    from afm_pipe.distributed.process_group import ProcessGroup
    from afm_pipe.sampling.requests import Request, Sampler


def import_weights(params: Params, name: str, settings: Imported | None = None) -> None:
    """Make a model of weights from outside, as `imported` in params says or as `settings` does."""
    from afm_pipe.models.released import describe, import_generator

    settings = settings or params.imported.get(name)
    if settings is None:
        raise UserError(f"Found no {name!r} under imported in params, expected one of {', '.join(params.imported)}.")
    if name in {*params.runs, *params.guided, *RESERVED_NAMES} or not valid_name(name):
        raise UserError(f"Found the name {name[:80]!r}, expected one that no run has, in small letters and digits.")
    described = paths.model(name) / "config.json"
    if paths.model(name).exists() and not (described.is_file() and _imported(read_json(described))):
        raise UserError(f"Found {paths.model(name)}, which was not imported: take another name, or move it away.")
    config = import_generator(settings, paths.model(name))
    print(f"{paths.model(name)}: {describe(config)}.")


def export(name: str, kind: str, out: Path) -> None:
    """Write a model for others: released, safetensors or diffusers."""
    from afm_pipe.models.exports import export as write_export

    write_export(find_model(name), paths.AUTOENCODER, kind, out)
    print(f"{out}: {name} as {kind}.")


def export_samples(params: Params, name: str, launch: Launch, out: Path) -> None:
    """Write the samples that evaluation measures as one npz in shuffled order, for ADM's evaluator."""
    from afm_pipe.distributed.process_group import init_distributed
    from afm_pipe.sampling.generate import labels_for
    from afm_pipe.sampling.image_writers import ShuffledNpz

    if out.suffix != ".npz" or out.is_dir():
        raise UserError(f"Found --out {out}, expected the name of a file that ends in .npz.")
    sampler, settings = load_sampler(params, name, launch.torch_device()), params.evaluate
    labels = labels_for(range(settings.samples), len(sampler.class_names)).tolist()

    def write(path: Path) -> Generator[Progress, None, None]:
        file = ShuffledNpz(path, labels, settings.seed)
        try:
            for indices, _, images in _measured_images(params, sampler, ranks):
                file.add(images)
                yield Progress(indices.stop, settings.samples, "samples")
            file.finish()
        finally:
            file.close()

    with init_distributed(sampler.device) as ranks:
        if not ranks.is_main_process:
            _compute(_measured_images(params, sampler, ranks))
            return
        with atomic_path(out) as aside:
            track(f"export {name}", write(aside))
    print(f"{out}: {settings.samples} samples of {name}, shuffled, for ADM's evaluator.")


def sample(params: Params, name: str, launch: Launch, request: "Request | None" = None) -> None:
    """Draw a model's grid (the first classes in rows, the same seeds for every model) and strips from seed to seed, or
    what `request` asks for."""
    from afm_pipe.distributed.process_group import init_distributed
    from afm_pipe.sampling.requests import assist, check_request, draw

    settings = params.sample
    if request:
        check_request(request)
    sampler = load_sampler(params, name, launch.torch_device())
    with init_distributed(sampler.device) as ranks:
        if request:
            asked = sampler, request, settings.seed, settings.per_class, settings.classes, ranks
            if ranks.is_main_process:
                print(track(f"sample {name}", draw(*asked)).words())
            else:
                assist(*asked)
            return
        if ranks.is_main_process:
            _draw_grids(params, name, sampler)
        if settings.keep_images and ranks.is_main_process:
            with atomic_path(paths.samples(name) / "images") as folder:
                track(f"keep images of {name}", _keep_images(params, sampler, folder, ranks))
        elif settings.keep_images:
            _compute(_measured_images(params, sampler, ranks))


def _draw_grids(params: Params, name: str, sampler: "Sampler") -> None:
    import torch

    from afm_pipe.sampling.generate import generate_images, grid
    from afm_pipe.sampling.requests import draw_interpolation

    settings = params.sample
    rows = min(settings.classes, len(sampler.class_names))
    labels = torch.arange(rows).repeat_interleave(settings.per_class)
    images = generate_images(
        sampler.generator,
        sampler.vae,
        settings.seed,
        range(len(labels)),
        labels,
        sampler.latent_shape,
        sampler.micro_batch,
        sampler.device,
    )
    with atomic_path(paths.samples(name) / "grid.png") as aside:
        grid(images, settings.per_class).save(aside, format="png")
    with atomic_path(paths.samples(name) / "interpolation.png") as aside:
        draw_interpolation(sampler, settings.seed, rows).save(aside, format="png")


def _keep_images(
    params: Params, sampler: "Sampler", folder: Path, ranks: "ProcessGroup"
) -> Generator[Progress, None, None]:
    """Write the very images that evaluation measures as PNG files by index."""
    from afm_pipe.sampling.image_writers import PngFolder

    files = PngFolder(folder)
    for indices, _, images in _measured_images(params, sampler, ranks):
        files.add(images)
        yield Progress(indices.stop, params.evaluate.samples, "images")


def _measured_images(
    params: Params, sampler: "Sampler", ranks: "ProcessGroup"
) -> "Iterator[tuple[range, torch.Tensor, torch.Tensor]]":
    """Yield the samples that evaluation measures, on the first rank."""
    from afm_pipe.sampling.generate import stream_images

    settings, classes = params.evaluate, len(sampler.class_names)
    return stream_images(
        sampler.generator, sampler.vae, params, settings.seed, settings.samples, classes, sampler.device, ranks
    )


def _compute(samples: "Iterator[object]") -> None:
    """Go through samples for the sake of the rank that gets them."""
    for _ in samples:
        pass


def evaluate(params: Params, name: str, launch: Launch) -> None:
    """Measure a run's samples against the reference."""
    from afm_pipe.distributed.process_group import init_distributed
    from afm_pipe.evaluation.metrics import Evaluator, assist, evaluate_run
    from afm_pipe.params.versions import versions
    from afm_pipe.runtime.identity import fingerprint

    device = launch.torch_device()
    generator, vae, shape, *_ = load_sampler(params, name, device)
    if shape != params.latent_shape:
        raise UserError(
            f"Found {paths.model(name)} on latents {shape}, expected {params.latent_shape}, as data and autoencoder in "
            "params make them: evaluate it with its own data."
        )
    provenance = {
        "run": name,
        "nfe": generator.nfe,
        "weights": "EMA",
        "images_seen": read_json(paths.model(name) / "config.json")["images_seen"],
        "generator_sha256": sha256_file(paths.model(name) / "generator.safetensors"),
        "autoencoder_sha256": sha256_file(paths.AUTOENCODER_WEIGHTS),
    }
    tools = Evaluator(params, paths.REFERENCE, device)
    measured = {
        "provenance": provenance,
        "evaluate": params.evaluate.model_dump(),
        "micro_batch": params.sample.micro_batch,
        "device": str(device),
    }
    hashes = {reference.name: reference.sha256 for reference in tools.references}
    hashes |= {"thumbnails": sha256_file(paths.REFERENCE / "thumbnails.npz")}
    identity = fingerprint(measured, hashes, versions("evaluate"))
    work_dir = paths.WORK / name / "evaluate"
    with init_distributed(device) as ranks:
        if not ranks.is_main_process:
            assist(params, generator, vae, tools, ranks, device)
            return
        with hold_lease(work_dir):
            run = evaluate_run(
                params,
                generator,
                vae,
                paths.REFERENCE,
                provenance,
                device,
                evaluator=tools,
                work_dir=work_dir / identity,
                checkpoint_seconds=launch.checkpoint_seconds,
                ranks=ranks,
            )
            metrics, nearest = track(f"evaluate {name}", run)
    write_json(paths.metrics(name), metrics)
    shutil.rmtree(work_dir / identity, ignore_errors=True)
    with atomic_path(paths.samples(name) / "nearest.png") as aside:
        nearest.save(aside, format="png")


def _imported(described: Any) -> bool:
    provenance = described.get("provenance") if isinstance(described, dict) else None
    return isinstance(provenance, dict) and "imported" in provenance
