"""Measurements of an autoencoder on images: the scaling factor and the reconstruction error.

Legend: N images, B batch size; C, H, W channels, height and width of images; c, h, w of latents.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.data.order import stream_generator
from afm_pipe.runtime.errors import UserError

MEASURED_IMAGES = 10_000  # enough for a scalar
MEASURING_BATCH = 100


def measured_scaling_factor(autoencoder: Autoencoder, images: Any, seed: int, most: int = MEASURED_IMAGES) -> float:
    """Return 1 / standard deviation of the latents of up to `most` of the `images` (N, C, H, W) uint8.

    Of a stochastic autoencoder, the latents are posterior samples. Raises UserError if the latents are constant.
    """
    total, squares, count = 0.0, 0.0, 0
    for encoded, noise, _ in _encoded(autoencoder, images, seed, most):
        latent = encoded.double()  # (B, c, h, w)
        if autoencoder.spec.stochastic:
            mean, std = encoded.chunk(2, dim=1)
            latent = (mean + std * noise).double()
        total += latent.sum().item()
        squares += latent.square().sum().item()
        count += latent.numel()
    variance = squares / count - (total / count) ** 2
    if not 0 < variance < math.inf:
        raise UserError(
            f"Found latents of variance {variance:g}, expected more than 0: use images that differ, or set "
            "autoencoder.scaling_factor to a number."
        )
    return 1 / math.sqrt(variance)


def reconstruction_mse(autoencoder: Autoencoder, images: Any, seed: int) -> float:
    """Return the mean squared error in [-1, 1] of reconstructing `images` (N, C, H, W) uint8 from (sampled) latents."""
    total, count = 0.0, 0
    for encoded, noise, pixels in _encoded(autoencoder, images, seed, MEASURED_IMAGES):
        decoded = autoencoder.decode(autoencoder.sample(encoded, noise))  # (B, C, H, W)
        total += (decoded - pixels).double().square().sum().item()
        count += decoded.numel()
    return total / count


def _encoded(autoencoder: Autoencoder, images: Any, seed: int, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield encodings, noise and pixels of batches of images that are spread evenly over the data set."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), most)).round().astype(int)
    random = stream_generator(seed, "autoencoder", "measure")
    spec, device = autoencoder.spec, autoencoder.device
    for indices in np.array_split(chosen, math.ceil(len(chosen) / MEASURING_BATCH)):
        batch = torch.from_numpy(images[indices])
        noise = torch.randn(len(indices), *spec.shape, generator=random).to(device)
        yield autoencoder.encode(batch), noise, spec.to_pixels(batch.to(device))
