"""Stages from images to latents and reference statistics, and the latent classifier."""

from contextlib import nullcontext
from typing import Any

from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.params.sizes import is_small
from afm_pipe.pipeline.current import classifier_identity, classifier_step
from afm_pipe.pipeline.find import open_latents
from afm_pipe.pipeline.notices import begin_work, notice_unused
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import atomic_path, sha256_file, write_json
from afm_pipe.runtime.lease import hold_lease
from afm_pipe.runtime.progress import track

IN_MEMORY = 4 << 30  # bytes; larger data sets are read on access


def prepare(params: Params) -> None:
    """Check, count and hash the images, and write their manifest and that of the held-out ones.

    A built-in data set is first written to disk.

    Raises UserError for images that a later stage cannot work with.
    """
    from afm_pipe.data.held_out import describe, hold_out, write_held_out
    from afm_pipe.data.manifest import write_manifest
    from afm_pipe.data.reading import build_manifest
    from afm_pipe.data.sources import BUILT_IN, materialize
    from afm_pipe.planning.measurable import require_measurable

    if params.data.source in BUILT_IN:
        track("materialize", materialize(params.data.source, paths.local(params.data.root)))
    every = track("prepare", build_manifest(params.data))
    manifest, held_out = track("hold out", hold_out(every, params.held_out, params.data))
    lines = [] if held_out is None else [describe(held_out)]
    lines += require_measurable(params, manifest, held_out)
    write_held_out(paths.HELD_OUT, held_out)
    write_manifest(paths.MANIFEST, manifest)
    print("\n".join([every.describe(), *lines]))


def autoencoder(params: Params, launch: Launch) -> None:
    """Make the autoencoder that params describe: fetch a pretrained one, or train a small one on the images."""
    from afm_pipe.autoencoders import autoencoder_kind

    with atomic_path(paths.AUTOENCODER) as folder:
        launch.use_threads(params.data.is_small)
        track("autoencoder", autoencoder_kind(params).make(params, folder, launch.torch_device()))


def encode(params: Params, launch: Launch) -> None:
    """Encode all images to latents, resuming an interrupted encoding."""
    from afm_pipe.autoencoders import load_autoencoder
    from afm_pipe.autoencoders.encoding import encode_dataset, partial_name, provenance_of
    from afm_pipe.data.manifest import read_manifest
    from afm_pipe.distributed.process_group import init_distributed

    launch.use_threads(params.data.is_small)
    device = launch.torch_device()
    vae = load_autoencoder(params, paths.AUTOENCODER, device)
    identity, manifest = sha256_file(paths.AUTOENCODER_WEIGHTS), read_manifest(paths.MANIFEST)
    work_dir = paths.WORK / "encode"
    own = partial_name(provenance_of(params, manifest, vae, identity))
    notice_unused(sorted(path for path in work_dir.glob("latents.*.h5") if path.name != own))
    with init_distributed(device) as ranks:
        track("encode", encode_dataset(params, manifest, vae, identity, paths.LATENTS, work_dir, ranks))


def reference(params: Params, launch: Launch) -> None:
    """Compute the statistics of the real images, the reference that samples are compared with."""
    from afm_pipe.autoencoders import load_autoencoder
    from afm_pipe.data.held_out import read_held_out
    from afm_pipe.data.manifest import read_manifest
    from afm_pipe.data.reading import LazyImages, load_images, require_images
    from afm_pipe.evaluation.held_out import add_held_out
    from afm_pipe.evaluation.reference import build_reference, describe_reconstructions
    from afm_pipe.planning.measurable import require_measurable

    launch.use_threads(params.data.is_small)
    device, manifest = launch.torch_device(), read_manifest(paths.MANIFEST)
    held_out = read_held_out(paths.HELD_OUT, params.held_out)
    require_measurable(params, manifest, held_out)  # params may have changed since `prepare`
    vae = load_autoencoder(params, paths.AUTOENCODER, device)
    vae.check(params)
    images: Any = LazyImages(manifest, params.data)
    if images.nbytes < IN_MEMORY:
        images = track("read images", load_images(manifest, params.data))
    else:
        track("check images", require_images(manifest, params.data))
    if params.held_out and held_out:
        others = params.held_out.data(params.data)
        track("check held-out images", require_images(held_out, others))
    with atomic_path(paths.REFERENCE) as folder:
        summary = track("reference", build_reference(params, manifest, images, vae, folder, device))
        print(describe_reconstructions(summary))
        if params.held_out and held_out:
            lines = track("held out", add_held_out(params, held_out, LazyImages(held_out, others), folder, device))
            print("\n".join(lines))
    with atomic_path(paths.REFERENCE_DONE) as temp:
        temp.write_text("reference\n")


def classifier(params: Params, launch: Launch) -> None:
    """Train the classifier that guides, from where an interrupted session stopped; without one in params, say so."""
    settings, step = params.classifier, classifier_step(params)
    if step.skip(launch):
        return

    from afm_pipe.distributed.process_group import init_distributed
    from afm_pipe.models.model_files import save_tensors
    from afm_pipe.objectives.latent_classifier import ClassifierTraining, accuracy_by_level
    from afm_pipe.runtime.environment import env_rank
    from afm_pipe.training.checkpoints import RetentionPolicy
    from afm_pipe.training.engine import Engine
    from afm_pipe.training.trainer import Runtime, Task, Trainer

    if settings is None:
        if env_rank() > 0:
            return
        with atomic_path(paths.CLASSIFIER) as folder:
            write_json(folder / "config.json", {"classifier": None})
        step.record()
        return
    launch.use_threads(is_small(settings.size))
    device = launch.torch_device()
    latents = open_latents(params)
    described = {"classifier": settings.model_dump(), "seed": params.seed}
    identity = classifier_identity(params, latents.fingerprint())
    objective = ClassifierTraining(settings, params.seed, latents.latent_shape, len(latents.classes))
    work_dir, seconds = paths.WORK / "classifier", launch.checkpoint_seconds
    with init_distributed(device) as group, hold_lease(work_dir) if group.is_main_process else nullcontext() as lease:
        retention = RetentionPolicy(launch.keep_checkpoints, check_lease=lease.check) if lease else RetentionPolicy()
        code = begin_work(work_dir / identity, "classifier") if lease else {}
        engine = Engine.of(launch)._replace(shard=False, ema_on_cpu=False)  # a small network
        runtime = Runtime(work_dir / identity, device, seconds, group, launch.micro_batch, retention, engine)
        trained = track("classifier", Trainer(Task(objective, latents, identity), runtime).train())
        if lease is None:
            return
        lease.check()
        channels, latent_size, _ = latents.latent_shape
        shape = {"size": settings.size, "channels": channels, "latent_size": latent_size}
        accuracy = accuracy_by_level(trained.state.ema, latents, params.seed, device)
        with atomic_path(paths.CLASSIFIER) as folder:
            folder.mkdir()
            save_tensors(folder / "classifier.safetensors", trained.state.ema.state_dict())
            classes = {"num_classes": len(latents.classes), "classes": list(latents.classes)}
            described |= shape | classes | {"provenance": {"code": code}} | accuracy
            write_json(folder / "config.json", described)
        step.record()
