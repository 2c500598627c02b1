"""The batches of a run: latents, labels, times and noise, each a function of (seed, stream, images seen)."""

from typing import Literal

import torch
from torch import Tensor

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.params import Run
from afm_pipe.training.step import Batch, PenaltyNoise

Stream = Literal["discriminator", "generator"]


class Batches:
    """Draws the batches of G and of D, which see the data in orders of their own."""

    def __init__(self, latents: Latents, run: Run, device: torch.device) -> None:
        self.latents, self.run, self.device = latents, run, device
        self.labels = torch.as_tensor(latents.labels)
        self.orders = {stream: Order(latents.num_images, run.seed, stream) for stream in ("discriminator", "generator")}

    def batch(self, stream: Stream, images_seen: int) -> Batch:
        """Return the batch of a stream that starts when G has seen `images_seen` images."""
        count, generator = self.run.batch_size, stream_generator(self.run.seed, stream, "noise", images_seen)
        indices = self.orders[stream].indices(images_seen, count)
        mirrors = torch.randint(self.latents.num_mirrors, (count,), generator=generator)
        mean, std = self.latents.moments(indices, mirrors)  # each (N, C, H, W)
        posterior, z = torch.randn(2, *mean.shape, generator=generator)
        x = torch.addcmul(mean, std, posterior) * self.latents.scaling_factor  # (N, C, H, W)
        batch = Batch(x, z, self.labels[indices])
        if self.run.nfe != 1:
            s, t = draw_times(self.run.nfe, count, generator)
            z_target = torch.randn(mean.shape, generator=generator)  # independent of z, as released
            batch = Batch(interpolate(x, z_target, t), interpolate(x, z, s), self.labels[indices], s, t)
        return batch.to(self.device)

    def penalty_noise(self, images_seen: int) -> PenaltyNoise:
        """Return the directions of the finite differences for the D step at `images_seen`."""
        count = round(self.run.batch_size * self.run.penalty.share)
        generator = stream_generator(self.run.seed, "penalty", images_seen)
        noises = torch.randn(2, count, *self.latents.latent_shape, generator=generator)
        return PenaltyNoise(*noises.to(self.device, non_blocking=True))


def draw_times(nfe: int | Literal["any"], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw source and target times, (N,) each: s in {1/n, ..., 1} and t = s - 1/n; any: s ~ U(0, 1), t ~ U(0, s)."""
    if nfe == "any":
        s, fraction = torch.rand(2, count, generator=generator)
        return s, s * fraction
    step = torch.randint(1, nfe + 1, (count,), generator=generator)
    return step / nfe, (step - 1) / nfe


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) x + t z for latents (N, C, H, W) and times (N,)."""
    return torch.lerp(x, z, t[:, None, None, None])
