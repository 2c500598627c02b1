"""The batches of a run: latents, labels and noise, each a function of (seed, stream, images seen)."""

from typing import Literal

import torch

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
        noises = torch.randn(2, *mean.shape, generator=generator)
        latents = torch.addcmul(mean, std, noises[0]) * self.latents.scaling_factor  # a posterior sample
        return Batch(*(part.to(self.device, non_blocking=True) for part in (latents, self.labels[indices], noises[1])))

    def penalty_noise(self, images_seen: int) -> PenaltyNoise:
        """Return the directions of the finite differences for the D step at `images_seen`."""
        count = round(self.run.batch_size * self.run.penalty.share)
        generator = stream_generator(self.run.seed, "penalty", images_seen)
        noises = torch.randn(2, count, *self.latents.latent_shape, generator=generator)
        return PenaltyNoise(*noises.to(self.device, non_blocking=True))
