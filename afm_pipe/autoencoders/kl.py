"""Kind kl: diffusers' AutoencoderKL, pretrained or trained on the images.

Legend: N images, B batch size; C, H, W channels, height and width of images; c, h, w of latents.
"""

from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from afm_pipe.autoencoders.diffusers_folder import DiffusersAutoencoder, fetch_pretrained
from afm_pipe.autoencoders.kl_training import moments, train_kl
from afm_pipe.autoencoders.measuring import measured_scaling_factor, reconstruction_mse
from afm_pipe.data.manifest import read_manifest
from afm_pipe.data.reading import load_images
from afm_pipe.params import Params
from afm_pipe.params.autoencoders import KLParams
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import write_json
from afm_pipe.runtime.progress import Progress

CPU = torch.device("cpu")


class KLAutoencoder(DiffusersAutoencoder, kind="kl"):
    """An AutoencoderKL for square images: stochastic latents, normalized by the scaling factor of its config."""

    network, stages, stochastic = AutoencoderKL, "block_out_channels", True

    @classmethod
    def make(cls, params: Params, folder: Path, device: torch.device) -> Generator[Progress, None, None]:
        """Copy the pretrained autoencoder, or train a small one on the images."""
        if _settings(params).pretrained is not None:
            fetch_pretrained(params, folder, cls)
            return
        images = yield from load_images(read_manifest(paths.MANIFEST), params.data)
        trained = yield from train_autoencoder(_settings(params), images, params.seed, device)
        trained.autoencoder.save(folder)
        write_json(folder / "training.json", {"reconstruction_mse": trained.reconstruction_mse})

    def _encode(self, pixels: Tensor) -> Tensor:
        return torch.cat(moments(self.model, pixels), dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample


class TrainedAutoencoder(NamedTuple):
    """A trained autoencoder and its reconstruction error on the training images."""

    autoencoder: KLAutoencoder
    reconstruction_mse: float
    """Mean squared error per pixel value in [-1, 1]."""


def train_autoencoder(
    params: KLParams, images: NDArray[np.uint8], seed: int, device: torch.device = CPU
) -> Generator[Progress, None, TrainedAutoencoder]:
    """Train an autoencoder on `images` (N, C, H, W) uint8 and set its scaling factor.

    Raises UserError if the loss is not finite.
    """
    model = yield from train_kl(params, images, seed, device)
    side, factor = images.shape[2], params.scaling_factor
    if factor == "measured":
        factor = measured_scaling_factor(KLAutoencoder(model, side), images, seed)
    model.register_to_config(scaling_factor=factor)
    trained = KLAutoencoder(model, side)
    return TrainedAutoencoder(trained, reconstruction_mse(trained, images, seed))


def _settings(params: Params) -> KLParams:
    assert isinstance(params.autoencoder, KLParams)
    return params.autoencoder
