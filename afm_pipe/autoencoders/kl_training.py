"""Training of a small KL autoencoder on the images.

Legend: N images, B batch size; C, H, W channels, height and width of images; c, h, w of latents.
"""

import math
from collections.abc import Generator

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import mse_loss

from afm_pipe.data.order import Order, stream_generator
from afm_pipe.params.autoencoders import KLParams, KLTraining
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress

UPDATES_PER_REPORT = 10


def train_kl(
    params: KLParams, images: NDArray[np.uint8], seed: int, device: torch.device
) -> Generator[Progress, None, AutoencoderKL]:
    """Train an AutoencoderKL on `images` (N, C, H, W) uint8; return it in eval mode.

    Loss: squared error per pixel value + kl_weight * (KL summed over a latent) / (pixel values of an image). Adam, with
    a linear decay of the learning rate to 0. Raises UserError if the loss is not finite.
    """
    train = params.train
    assert train is not None
    model = _untrained(params, train, images.shape[1], images.shape[2], seed).to(device).train()
    adam = torch.optim.Adam(model.parameters(), lr=train.lr)
    order = Order(len(images), seed, "autoencoder")
    noise = stream_generator(seed, "autoencoder", "noise")
    num_values = math.prod(images.shape[1:])
    for update in range(train.updates):
        indices = order.indices(update * train.batch_size, train.batch_size)  # (B,)
        batch = torch.from_numpy(images[indices.numpy()]).to(device).float() / 127.5 - 1  # (B, C, H, W)
        mean, std = moments(model, batch)  # (B, c, h, w) each
        latent = mean + std * torch.randn(mean.shape, generator=noise).to(device)
        reconstruction = mse_loss(model.decode(latent).sample, batch)
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum() / len(batch)
        loss = reconstruction + train.kl_weight * kl / num_values
        if not math.isfinite(loss.item()):
            raise UserError(f"Found loss {loss.item()} at autoencoder update {update}: lower autoencoder.train.lr.")
        adam.param_groups[0]["lr"] = train.lr * (1 - update / train.updates)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if (update + 1) % UPDATES_PER_REPORT == 0 or update + 1 == train.updates:
            yield Progress(update + 1, train.updates, "updates", f"mse {reconstruction.item():.4f}, kl {kl.item():.1f}")
    return model.eval().requires_grad_(False)


def moments(model: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (B, c, h, w) float32 each, of the latents of pixels (B, C, H, W)."""
    posterior = model.encode(pixels).latent_dist
    return posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()  # clamped by diffusers to [-30, 20]


def _untrained(params: KLParams, train: KLTraining, channels: int, side: int, seed: int) -> AutoencoderKL:
    levels = len(train.block_out_channels)
    with torch.random.fork_rng(devices=[]):  # weights are initialized from the global random state
        torch.manual_seed(seed)
        return AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=train.block_out_channels,
            layers_per_block=train.layers_per_block,
            latent_channels=params.latent_channels,
            norm_num_groups=train.norm_groups,
            sample_size=side,
            mid_block_add_attention=train.mid_attention,
        )
