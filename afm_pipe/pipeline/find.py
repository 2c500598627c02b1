"""Look up a run, its model, its data and its budget."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.params import Params
from afm_pipe.pipeline.notices import notice_model
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, sha256_file

if TYPE_CHECKING:
    import torch

    from afm_pipe.data.latents import Latents
    from afm_pipe.data.manifest import Manifest
    from afm_pipe.models.model_files import ModelConfig
    from afm_pipe.planning.budget import Budget
    from afm_pipe.sampling.sampler import Sampler


def count_images(params: Params) -> "Manifest | None":
    """Return the manifest if `prepare` has written it for the images in params, else None."""
    from afm_pipe.data.manifest import read_manifest

    if not paths.MANIFEST.exists():
        return None
    manifest = read_manifest(paths.MANIFEST)
    return manifest if Path(params.data.root) in (manifest.root, manifest.root.parent) else None


def find_model(name: str) -> Path:
    """Return the folder of a model. Raises UserError for an invalid name, such as one with a slash."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", name):  # a dot: a name of version 0.1
        raise UserError(
            f"Found the model name {name[:80]!r}, expected at most 64 lowercase letters, digits, dots, dashes and "
            "underscores: name a folder in models/."
        )
    return paths.model(name)


def run_budget(params: Params, name: str, launch: Launch, world_size: int | None = None) -> "Budget":
    """Return the memory that each process of a run needs, unallocated. Assumes 1,000 classes before `prepare`.

    `world_size` defaults to that of the launch settings.
    """
    from afm_pipe.planning.budget import budget

    manifest = count_images(params)
    config = model_config(params, name, len(manifest.classes) if manifest else 1000)
    world_size = world_size or launch.world_size
    return budget(
        params.model(name), config, world_size, launch.micro_batch, launch.checkpoint_activations, launch.shard
    )


def require_memory(
    params: Params, name: str, launch: Launch, device: "torch.device", world_size: int | None = None
) -> None:
    """Raise UserError, naming what would fit, when the device's free memory cannot hold a run."""
    from afm_pipe.planning.budget import free_memory, what_fits

    needs, free = run_budget(params, name, launch, world_size), free_memory(device)
    if needs.memory_bytes <= free:
        return
    manifest = count_images(params)
    config = model_config(params, name, len(manifest.classes) if manifest else 1000)
    fitting = what_fits(params.model(name), config, world_size or launch.world_size, free)
    raise UserError(
        f"Found {free / 2**30:.1f} GiB of memory free on {device}, expected {needs.memory_bytes / 2**30:.1f} GiB for "
        f"the run {name} ({needs.state_bytes / 2**30:.1f} for weights and optimizers, "
        f"{needs.activation_bytes / 2**30:.1f} for activations). Of these settings, estimated, would fit:"
        + "".join(f"\n  {line}" for line in fitting or ["none: use a device with more memory"])
    )


def model_config(params: Params, name: str, num_classes: int) -> "ModelConfig":
    """Return the config of a run's model."""
    from afm_pipe.models.model_files import run_config

    return run_config(params.model(name), params.latent_shape, num_classes)


def open_latents(params: Params) -> "Latents":
    """Open the latents. Raises UserError if they belong to other params or to another autoencoder."""
    from afm_pipe.data.latents import Latents

    if not paths.AUTOENCODER_WEIGHTS.is_file():
        raise UserError(f"Found no {paths.AUTOENCODER_WEIGHTS}: run `dvc repro autoencoder`.")
    return Latents.open(paths.LATENTS, params, sha256_file(paths.AUTOENCODER_WEIGHTS))


def load_sampler(params: Params, name: str, device: "torch.device", group: ProcessGroup = SINGLE_PROCESS) -> "Sampler":
    """Load a model for sampling. Raises UserError if it was trained on latents of another autoencoder."""
    from afm_pipe.autoencoders import load_autoencoder
    from afm_pipe.models.model_files import load_config, load_generator
    from afm_pipe.sampling.sampler import Sampler

    folder = find_model(name)
    generator, described = load_generator(folder, device), read_json(folder / "config.json")
    notice_model(folder)
    config, vae = load_config(folder), load_autoencoder(params, paths.AUTOENCODER, device)
    found = (vae.spec.shape[0], vae.spec.scaling_factor or 1.0)
    factor, names = described.get("scaling_factor"), described.get("classes")
    if not _describes(factor, names, config.num_classes):
        raise UserError(
            f"Found {folder / 'config.json'} without {config.num_classes} class names or with a scaling factor that is "
            "not a positive number: train or import it again."
        )
    expected = (config.channels, factor or found[1])
    if found[0] != expected[0] or not math.isclose(found[1], expected[1], rel_tol=1e-6):
        raise UserError(
            f"Found {paths.AUTOENCODER} with {found[0]} latent channels and scaling factor {found[1]:g}, expected "
            f"{expected[0]} and {expected[1]:g}, on which {folder} was trained: restore that autoencoder."
        )
    size = params.sample.micro_batch
    return Sampler(generator, vae, config.latent_shape, names, size, device, group)


def _describes(factor: object, names: object, num_classes: int) -> bool:
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        return False
    return factor is None or (isinstance(factor, int | float) and math.isfinite(factor) and factor > 0)
