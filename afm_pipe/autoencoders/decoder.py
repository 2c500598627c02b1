"""The small convolutional decoder of a representation, and its training.

Legend: N images, B batch size; C, H, W channels, height and width of images; c, h, w of latents.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.data.order import Order, stream_generator
from afm_pipe.params.autoencoders import DecoderTraining
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress

UPDATES_PER_REPORT = 10
GROUP = 8  # channels that share a normalization, where the width allows


class ResidualBlock(nn.Module):
    """Two convolutions with group norms, initialized to the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        groups = max(width // GROUP, 1) if width % GROUP == 0 else 1
        self.norm1, self.conv1 = nn.GroupNorm(groups, width), _conv(width, width)
        self.norm2, self.conv2 = nn.GroupNorm(groups, width), _conv(width, width)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, width, h, w) -> the same
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Decoder(nn.Sequential):
    """A residual block per resolution, and a sub-pixel convolution from each to the next (Shi et al. 2016)."""

    def __init__(self, latent_channels: int, widths: Sequence[int], channels: int) -> None:
        """Decode latents (B, c, h, w) to pixels (B, C, h * 2^k, w * 2^k), for 1 + k `widths`."""
        layers: list[nn.Module] = [_conv(latent_channels, widths[0]), ResidualBlock(widths[0])]
        for before, width in zip(widths, widths[1:], strict=False):
            layers += [_conv(before, 4 * width), nn.PixelShuffle(2), ResidualBlock(width)]
        super().__init__(*layers, nn.SiLU(), _conv(widths[-1], channels))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def build_decoder(latent_channels: int, widths: Sequence[int], channels: int, seed: int) -> Decoder:
    """Build a decoder, initialized from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(latent_channels, widths, channels)


def train_decoder(
    decoder: Decoder,
    train: DecoderTraining,
    images: Any,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    mirror: bool,
    seed: int,
) -> Generator[Progress, None, None]:
    """Train a decoder on `images` (N, C, H, W) uint8 with the squared error per pixel value in [-1, 1].

    `encode` maps images (B, C, H, W) uint8 to normalized latents (B, c, h, w) and pixels (B, C, H, W). With `mirror`,
    half of the images are mirrored. Adam, with a linear decay of the learning rate to 0. Raises UserError if the loss
    is not finite.
    """
    decoder.train()
    adam = torch.optim.Adam(decoder.parameters(), lr=train.lr)
    order = Order(len(images), seed, "decoder")
    for update in range(train.updates):
        random = stream_generator(seed, "decoder", update)
        indices = order.indices(update * train.batch_size, train.batch_size).tolist()
        batch = torch.from_numpy(images[indices])  # (B, C, H, W)
        if mirror:
            flipped = torch.rand(len(batch), 1, 1, 1, generator=random) < 0.5
            batch = torch.where(flipped, batch.flip(-1), batch)
        latents, pixels = encode(batch)
        if train.noise:
            deviation = train.noise * torch.randn(len(batch), 1, 1, 1, generator=random).abs()
            noise = deviation * torch.randn(latents.shape, generator=random)
            latents = latents + noise.to(latents.device)
        loss = F.mse_loss(decoder(latents), pixels)
        if not math.isfinite(loss.item()):
            raise UserError(f"Found loss {loss.item()} at decoder update {update}: lower autoencoder.train.lr.")
        adam.param_groups[0]["lr"] = train.lr * (1 - update / train.updates)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if (update + 1) % UPDATES_PER_REPORT == 0 or update + 1 == train.updates:
            yield Progress(update + 1, train.updates, "updates", f"mse {loss.item():.4f}")
    decoder.eval().requires_grad_(False)
