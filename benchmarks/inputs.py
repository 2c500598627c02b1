"""Inputs of the benchmarks: files and networks of real shapes with random content."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image

from afm_pipe.data.latents import Latents
from afm_pipe.data.latents_format import DONE, FORMAT_VERSION, MOMENTS, create_latents_file
from afm_pipe.params import LatentSpec

CLASS_COUNT = 10


def latents_file(path: Path, images: int, shape: tuple[int, int, int]) -> Latents:
    """Write a latents file of random moments of latents (C, H, W) and open it."""
    channels, height, width = shape
    random = np.random.default_rng(0)
    names = ("vae_sha256", "manifest_digest")
    attributes = dict.fromkeys(names, "0" * 64) | {"format_version": FORMAT_VERSION, "scaling_factor": "1.0"}
    classes = [str(number) for number in range(CLASS_COUNT)]
    create_latents_file(
        path, LatentSpec(shape, stochastic=True), 1, np.arange(images) % CLASS_COUNT, classes, attributes
    )
    with h5py.File(path, "r+") as file:
        file[DONE][:] = True
        moments = file[MOMENTS]
        for start in range(0, images, 1024):
            count = min(1024, images - start)
            block = random.random((count, 1, 2 * channels, height, width), np.float32)
            moments[start : start + count] = block.astype(np.float16)
    return Latents.open(path)


def photographs(root: Path, count: int) -> None:
    """Write JPEG files of ImageNet's typical 500 x 375 pixels, in two class folders."""
    random = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (48, 64, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=92)


def sd_vae() -> Any:
    """Return an untrained autoencoder of SD-VAE's shape for images of 256 x 256 pixels."""
    from diffusers import AutoencoderKL

    from afm_pipe.autoencoders.kl import KLAutoencoder

    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    shape = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    return KLAutoencoder(AutoencoderKL(**kinds, **shape, scaling_factor=0.18215), 256)
