"""Kind tiny: diffusers' AutoencoderTiny, pretrained, such as TAESD: SD-VAE's latent space at a hundredth of its size.

Legend: B batch size; C, H, W channels, height and width of images; c, h, w of latents.
"""

from collections.abc import Generator
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from afm_pipe.autoencoders.diffusers_folder import DiffusersAutoencoder, fetch_pretrained, write_config
from afm_pipe.autoencoders.hub import CONFIG
from afm_pipe.autoencoders.measuring import measured_scaling_factor
from afm_pipe.data.manifest import read_manifest
from afm_pipe.data.reading import LazyImages, require_images
from afm_pipe.params import Params
from afm_pipe.params.autoencoders import TinyParams
from afm_pipe.runtime import paths
from afm_pipe.runtime.progress import Progress

MEASURED_IMAGES = 1_000  # each takes a large network's time, and a scalar needs no more


class TinyAutoencoder(DiffusersAutoencoder, kind="tiny"):
    """An AutoencoderTiny for square images: deterministic latents, normalized by the scaling factor of its config."""

    network, stages, stochastic = AutoencoderTiny, "encoder_block_out_channels", False

    @classmethod
    def make(cls, params: Params, folder: Path, device: torch.device) -> Generator[Progress, None, None]:
        """Copy the pretrained autoencoder; with scaling_factor `measured`, measure it on the images."""
        settings = params.autoencoder
        assert isinstance(settings, TinyParams)
        pretrained = fetch_pretrained(params, folder, cls).to(device)
        if settings.scaling_factor == "measured":
            manifest = read_manifest(paths.MANIFEST)
            yield from require_images(manifest, params.data)
            images = LazyImages(manifest, params.data)
            factor = measured_scaling_factor(pretrained, images, params.seed, MEASURED_IMAGES)
            write_config(folder / CONFIG, folder, factor)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels).latents

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample
