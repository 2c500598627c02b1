"""The stages as functions: each reads its declared inputs, calls the library, writes its declared outputs.

The scripts in stages/ (what DVC runs) and the commands of `afm-pipe` are two doors to these functions.
"""

import math
import resource
import shutil
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afm_pipe import paths
from afm_pipe.console import Tick, follow
from afm_pipe.errors import UserError
from afm_pipe.files import atomic_path, exclusive, read_json, sha256_file, write_json
from afm_pipe.launch import Launch, machine_name
from afm_pipe.params import RESERVED_NAMES, Imported, Params, Run, valid_name

if TYPE_CHECKING:
    import torch

    from afm_pipe.data.latents import Latents
    from afm_pipe.data.manifest import Manifest
    from afm_pipe.drawing import Request, Sampler
    from afm_pipe.models.checkpoint_format import ModelConfig
    from afm_pipe.training.budget import Budget
    from afm_pipe.training.state import Start, TrainingState

IN_MEMORY = 4 << 30  # bytes; data sets of more pixels are read as they are needed


def prepare(params: Params) -> None:
    """Check, count and hash the images, and write their manifest; a built-in data set is written out first."""
    from afm_pipe.data.manifest import build_manifest, write_manifest
    from afm_pipe.data.sources import BUILT_IN, materialise

    root = Path(params.data.root)
    if params.data.source in BUILT_IN:
        follow("materialise", materialise(params.data.source, root))
    manifest = follow("prepare", build_manifest(params.data))
    write_manifest(paths.MANIFEST, manifest)
    print(f"{manifest.num_images} images of {len(manifest.classes)} classes under {manifest.root}.")


def autoencoder(params: Params, launch: Launch) -> None:
    """Fetch the pretrained autoencoder, or train a small one on the images."""
    from afm_pipe.data.manifest import load_images, read_manifest
    from afm_pipe.models.autoencoder import fetch_pretrained, save_autoencoder, train_autoencoder

    with atomic_path(paths.AUTOENCODER) as folder:
        if params.autoencoder.pretrained is not None:
            fetch_pretrained(params, folder)
            return
        images = follow("read images", load_images(read_manifest(paths.MANIFEST), params.data))
        training = train_autoencoder(params.autoencoder, images, params.seed, launch.torch_device())
        trained = follow("autoencoder", training)
        save_autoencoder(trained.autoencoder, folder)
        write_json(folder / "training.json", {"reconstruction_mse": trained.reconstruction_mse})


def encode(params: Params, launch: Launch) -> None:
    """Encode every image to its latent moments, from where an interrupted encoding stopped."""
    from afm_pipe.data.encoding import encode_dataset
    from afm_pipe.data.manifest import read_manifest
    from afm_pipe.models.autoencoder import autoencoder_sha256, load_autoencoder

    device = launch.torch_device()
    vae, identity = load_autoencoder(paths.AUTOENCODER, device), autoencoder_sha256(paths.AUTOENCODER)
    manifest, work_dir = read_manifest(paths.MANIFEST), paths.WORK / "encode"
    follow("encode", encode_dataset(params, manifest, vae, identity, paths.LATENTS, work_dir, device))


def reference(params: Params, launch: Launch) -> None:
    """Measure the real images: the statistics that samples are held against."""
    from afm_pipe.data.manifest import UnreadImages, load_images, read_manifest, require_images
    from afm_pipe.evaluation.reference import build_reference
    from afm_pipe.models.autoencoder import load_autoencoder

    device, manifest = launch.torch_device(), read_manifest(paths.MANIFEST)
    vae = load_autoencoder(paths.AUTOENCODER, device)
    images: Any = UnreadImages(manifest, params.data)
    if images.nbytes < IN_MEMORY:
        images = follow("read images", load_images(manifest, params.data))
    else:
        follow("look for images", require_images(manifest, params.data))
    with atomic_path(paths.REFERENCE) as folder:
        building = build_reference(
            params, images, manifest.labels, manifest.classes, manifest.digest, vae, folder, device
        )
        follow("reference", building)


def classifier(params: Params, launch: Launch) -> None:
    """Train the classifier that guides, from where an interrupted training stopped; without one in params, say so."""
    from afm_pipe.fingerprint import TRAINING_SOURCES, fingerprint
    from afm_pipe.models.checkpoint_format import save_tensors
    from afm_pipe.training.classifier import accuracy_by_level, train_latent_classifier

    settings, device = params.classifier, launch.torch_device()
    if settings is None:
        with atomic_path(paths.CLASSIFIER) as folder:
            write_json(folder / "config.json", {"classifier": None})
        return
    latents = _latents(params)
    described = {"classifier": settings.model_dump(), "seed": params.seed}
    identity = fingerprint(described, {"latents": latents.fingerprint()}, TRAINING_SOURCES)
    work_dir = paths.WORK / "classifier"
    with exclusive(work_dir), atomic_path(paths.CLASSIFIER) as folder:
        training = train_latent_classifier(
            settings, latents, params.seed, work_dir / identity, identity, device, launch.checkpoint_seconds
        )
        trained = follow("classifier", training)
        folder.mkdir()
        save_tensors(folder / "classifier.safetensors", trained.ema.state_dict())
        channels, latent_size, _ = latents.latent_shape
        shape = {"size": settings.size, "channels": channels, "latent_size": latent_size}
        accuracy = accuracy_by_level(trained.ema, latents, params.seed, device)
        write_json(folder / "config.json", described | shape | {"num_classes": len(latents.classes)} | accuracy)


def train(params: Params, name: str, launch: Launch) -> None:
    """Train a run to its end, from where an interrupted training stopped, and write its model, curves and cost.

    A guided run starts from the model of the run it continues.
    """
    from afm_pipe.fingerprint import training_identity
    from afm_pipe.live_log import logged
    from afm_pipe.study.cells import probes
    from afm_pipe.training.budget import require_memory
    from afm_pipe.training.curves import write_curves
    from afm_pipe.training.loop import train as train_loop

    run, device = named_run(params, name), launch.torch_device()
    require_memory(run_budget(params, name), name, device)
    latents = _latents(params)
    config = _model_config(params, name, len(latents.classes))
    start, guide, origins = _origin(params, name, run, device)
    identity = training_identity(run, params.latent_shape, latents.fingerprint(), origins)
    keep_at = probes(run, latents.num_images, continues=start is not None)  # as a cell of a table would
    work_dir = paths.WORK / name
    with exclusive(work_dir):
        training = train_loop(
            run,
            config,
            latents,
            work_dir / identity,
            identity,
            device,
            launch.checkpoint_seconds,
            start,
            guide,
            keep_at,
        )
        live = logged(training, work_dir / identity / "curves.csv", paths.WORK / "dvclive" / name)
        trained = follow(f"train {name}", live)
        for note in trained.notes:
            print(note)
        description = {
            "model": config.model_dump(),
            "name": name,
            "run": run.model_dump(),
            "classes": list(latents.classes),
            "scaling_factor": latents.scaling_factor,
            "provenance": {"fingerprint": identity, "latents": latents.provenance, **origins},
            "updates": trained.state.update,
            "images_seen": trained.state.update * run.batch_size,
        }
        _write_model(name, trained.state, description)
        write_curves(paths.curves(name), trained.state.rows)
        own_updates = trained.state.update - (start.update if start else 0)
        write_json(paths.costs(name), _cost(trained.state, own_updates, run.batch_size, device))


def import_weights(params: Params, name: str, settings: Imported | None = None) -> None:
    """Make a model of weights from outside, as `imported` in params says or as `settings` does."""
    from afm_pipe.models.released import describe, import_generator

    settings = settings or params.imported.get(name)
    if settings is None:
        raise UserError(f"Found no {name!r} under imported in params, expected one of {', '.join(params.imported)}.")
    if name in {*params.runs, *params.guided, *RESERVED_NAMES} or not valid_name(name):
        raise UserError(f"Found the name {name!r}, expected one that no run has, in small letters and digits.")
    described = paths.model(name) / "config.json"
    if paths.model(name).exists() and not (described.is_file() and _imported(read_json(described))):
        raise UserError(f"Found {paths.model(name)}, which was not imported: take another name, or move it away.")
    config = import_generator(settings, paths.model(name))
    print(f"{paths.model(name)}: {describe(config)}.")


def export(name: str, kind: str, out: Path) -> None:
    """Write a model for others: released, safetensors or diffusers."""
    from afm_pipe.models.exports import export as write_export

    write_export(paths.model(name), paths.AUTOENCODER, kind, out)
    print(f"{out}: {name} as {kind}.")


def export_samples(params: Params, name: str, launch: Launch, out: Path) -> None:
    """Write the samples that evaluation measures as one npz in shuffled order, for ADM's evaluator."""
    from afm_pipe.image_files import ShuffledNpz
    from afm_pipe.sampling import labels_for, stream_images

    if out.suffix != ".npz" or out.is_dir():
        raise UserError(f"Found --out {out}, expected the name of a file that ends in .npz.")
    sampler, settings = load_sampler(params, name, launch.torch_device()), params.evaluate
    num_classes = len(sampler.class_names)
    labels = labels_for(range(settings.samples), num_classes).tolist()

    def write(path: Path) -> Generator[Tick, None, None]:
        file = ShuffledNpz(path, labels, settings.seed)
        try:
            for indices, _, images in stream_images(
                sampler.generator, sampler.vae, params, settings.seed, settings.samples, num_classes, sampler.device
            ):
                file.add(images)
                yield Tick(indices.stop, settings.samples, "samples")
            file.finish()
        finally:
            file.close()

    with atomic_path(out) as aside:
        follow(f"export {name}", write(aside))
    print(f"{out}: {settings.samples} samples of {name}, shuffled, for ADM's evaluator.")


def sample(params: Params, name: str, launch: Launch, request: "Request | None" = None) -> None:
    """Draw a model's grid (the first classes in rows, the same seeds for every model) and strips from seed to seed, or
    what `request` asks for."""
    import torch

    from afm_pipe.drawing import check_request, draw, draw_interpolation
    from afm_pipe.sampling import generate_images, grid

    settings = params.sample
    if request:
        check_request(request)
    sampler = load_sampler(params, name, launch.torch_device())
    if request:
        drawing = draw(sampler, request, settings.seed, settings.per_class, settings.classes)
        drawn = follow(f"sample {name}", drawing)
        print(drawn.words())
        return
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
    if settings.keep_images:
        with atomic_path(paths.samples(name) / "images") as folder:
            follow(f"keep images of {name}", _keep_images(params, sampler, folder))


def _keep_images(params: Params, sampler: "Sampler", folder: Path) -> Generator[Tick, None, None]:
    """Write the very images that evaluation measures as PNG files by index."""
    from afm_pipe.image_files import PngFolder
    from afm_pipe.sampling import stream_images

    settings, files, num_classes = params.evaluate, PngFolder(folder), len(sampler.class_names)
    for indices, _, images in stream_images(
        sampler.generator, sampler.vae, params, settings.seed, settings.samples, num_classes, sampler.device
    ):
        files.add(images)
        yield Tick(indices.stop, settings.samples, "images")


def evaluate(params: Params, name: str, launch: Launch) -> None:
    """Measure a run's samples against the reference."""
    from afm_pipe.evaluation.metrics import Evaluator, evaluate_run
    from afm_pipe.fingerprint import fingerprint
    from afm_pipe.models.autoencoder import autoencoder_sha256

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
        "autoencoder_sha256": autoencoder_sha256(paths.AUTOENCODER),
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
    identity = fingerprint(measured, hashes, ("evaluation", "sampling.py", "models"))
    work_dir = paths.WORK / name / "evaluate"
    with exclusive(work_dir):
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
        )
        metrics, nearest = follow(f"evaluate {name}", run)
    write_json(paths.metrics(name), metrics)
    shutil.rmtree(work_dir / identity, ignore_errors=True)
    with atomic_path(paths.samples(name) / "nearest.png") as aside:
        nearest.save(aside, format="png")


def tables(params: Params, names: Sequence[str], launch: Launch, out: Path | None = None) -> None:
    """Train and measure the missing cells of some tables, or of all, and write the tables, to `out` if it is given."""
    from afm_pipe.study.cells import Jobs, write_tables

    jobs = Jobs(params, names)
    if not all(job.result.is_file() for job in jobs.all):
        from afm_pipe.study.training import run_jobs

        device = launch.torch_device()
        workers = launch.num_workers(device)
        title = " ".join(["table", *names])
        follow(title, run_jobs(params, jobs.all, device, workers, launch.checkpoint_seconds))
    for path in write_tables(jobs, out):
        print(path)


def toy(params: Params, launch: Launch) -> None:
    """Run the study on a line, where the best map is known: its numbers, the maps themselves, and three figures."""
    from afm_pipe.toy.study import run_study
    from afm_pipe.toy.writing import write_study

    study = follow("toy", run_study(params.toy, params.seed, launch.torch_device()))
    with atomic_path(paths.TOY) as folder:
        write_study(study, params.toy, folder)


def report(params: Params) -> None:
    """Write the page and the tables from what the other stages measured."""
    from afm_pipe.reporting.page import write_report

    with atomic_path(paths.REPORTS) as folder:
        write_report(params, folder)
    print(f"The report is {paths.REPORTS / 'index.html'}.")


def run_budget(params: Params, name: str) -> "Budget":
    """Return what a run needs, counted without allocating it; before there is data, as if it had 1,000 classes."""
    from afm_pipe.training.budget import budget

    manifest = known_images(params)
    return budget(named_run(params, name), _model_config(params, name, len(manifest.classes) if manifest else 1000))


def known_images(params: Params) -> "Manifest | None":
    """Return the manifest of the images params name, if `prepare` has made it; another profile's is not taken."""
    from afm_pipe.data.manifest import read_manifest

    if not paths.MANIFEST.exists():
        return None
    manifest = read_manifest(paths.MANIFEST)
    return manifest if Path(params.data.root) in (manifest.root, manifest.root.parent) else None


def load_sampler(params: Params, name: str, device: "torch.device") -> "Sampler":
    """Return a model ready to draw from. Raises UserError when the autoencoder is not that of its latents."""
    from afm_pipe.drawing import Sampler
    from afm_pipe.models.autoencoder import load_autoencoder
    from afm_pipe.models.checkpoint_format import load_config, load_generator

    folder = paths.model(name)
    generator, described = load_generator(folder, device), read_json(folder / "config.json")
    config, vae = load_config(folder), load_autoencoder(paths.AUTOENCODER, device)
    found = (vae.config.latent_channels, vae.config.scaling_factor)
    expected = (config.channels, described.get("scaling_factor") or found[1])
    if found[0] != expected[0] or not math.isclose(found[1], expected[1], rel_tol=1e-6):
        raise UserError(
            f"Found {paths.AUTOENCODER} with {found[0]} latent channels and scaling factor {found[1]:g}, expected "
            f"{expected[0]} and {expected[1]:g}, on which {folder} was trained: put that autoencoder there."
        )
    names = described["classes"]
    return Sampler(generator, vae, config.latent_shape, names, params.sample.micro_batch, device)


def _imported(described: dict[str, Any]) -> bool:
    return "imported" in described.get("provenance", {})


def named_run(params: Params, name: str) -> Run:
    """Return a run by name, guided ones resolved. Raises UserError naming those there are."""
    if name not in params.models:
        raise UserError(f"Found no run {name!r} in params, expected one of {', '.join(params.models)}.")
    return params.models[name]


def _origin(
    params: Params, name: str, run: Run, device: "torch.device"
) -> tuple["Start | None", "torch.nn.Module | None", dict[str, str]]:
    """Return what a run begins from and is guided by, if anything, and the hashes of those."""
    from afm_pipe.models.checkpoint_format import load_tensors
    from afm_pipe.models.classifier import load_latent_classifier
    from afm_pipe.training.state import Start

    files, start, guide = {}, None, None
    if name in params.guided:
        base = paths.model(params.guided[name].base)
        files = {part: base / f"{part}.safetensors" for part in ("generator", "discriminator")}
        updates = read_json(base / "config.json")["updates"]
        start = Start(load_tensors(files["generator"]), load_tensors(files["discriminator"]), updates)
    if run.guided:
        guide = load_latent_classifier(paths.CLASSIFIER, device)
        files["classifier"] = paths.CLASSIFIER / "classifier.safetensors"
    return start, guide, {part: sha256_file(file) for part, file in files.items()}


def _latents(params: Params) -> "Latents":
    from afm_pipe.data.latents import Latents

    if not paths.AUTOENCODER_WEIGHTS.is_file():
        raise UserError(f"Found no {paths.AUTOENCODER_WEIGHTS}: run `dvc repro autoencoder`.")
    return Latents.open(paths.LATENTS, params, sha256_file(paths.AUTOENCODER_WEIGHTS))


def _model_config(params: Params, name: str, num_classes: int) -> "ModelConfig":
    from afm_pipe.models.checkpoint_format import run_config

    return run_config(params.models[name], params.latent_shape, num_classes)


def _write_model(name: str, state: "TrainingState", description: dict[str, Any]) -> None:
    from afm_pipe.models.checkpoint_format import save_model

    with atomic_path(paths.model(name)) as folder:
        save_model(folder, state.ema, state.discriminator, description)


def _cost(state: "TrainingState", updates: int, batch_size: int, device: "torch.device") -> dict[str, Any]:
    import torch

    seconds = state.seconds["training"]
    return {
        "machine": machine_name(device),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "updates": updates,
        "images": updates * batch_size,
        "updates_per_second": updates / seconds,
        "images_per_second": updates * batch_size / seconds,
        "data_wait_share": state.seconds["data_wait"] / seconds,
        "checkpoint_share": state.seconds["saving"] / seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # Linux counts in KiB
    }
