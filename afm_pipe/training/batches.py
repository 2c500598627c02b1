"""The batches of a run: latents, labels, times and noise, each a function of (seed, stream, images seen)."""

from typing import Literal

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.params import Augmentation, Guidance, Run
from afm_pipe.training.augment import View, discriminator_view
from afm_pipe.training.guidance import guide_at_times, guide_to_data
from afm_pipe.training.losses import interpolate
from afm_pipe.training.step import Batch, Guide, PenaltyNoise

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
        x = self.latents.draw(indices, generator)  # (N, C, H, W)
        z = torch.randn(x.shape, generator=generator)
        batch = Batch(x, z, self.labels[indices])
        if self.run.nfe != 1:
            s, t = draw_times(self.run.nfe, count, generator)
            z_target = torch.randn(x.shape, generator=generator)  # independent of z, as released
            batch = Batch(interpolate(x, z_target, t), interpolate(x, z, s), self.labels[indices], s, t)
        return batch.to(self.device)

    def penalty_noise(self, images_seen: int) -> PenaltyNoise | None:
        """Return the directions of the finite differences for the D step at `images_seen`, if it has penalties."""
        if images_seen // self.run.batch_size % self.run.penalty.every:
            return None
        count = round(self.run.batch_size * self.run.penalty.share)
        generator = stream_generator(self.run.seed, "penalty", images_seen)
        noises = torch.randn(2, count, *self.latents.latent_shape, generator=generator)
        return PenaltyNoise(*noises.to(self.device, non_blocking=True))

    def view(self, augment: Augmentation | None, stream: Stream, images_seen: int) -> View | None:
        """Return how D sees the latents of a stream's batch, if the phase augments them."""
        if augment is None:
            return None
        generator = stream_generator(self.run.seed, "augment", stream, images_seen)
        return discriminator_view(augment, self.run.batch_size, self.latents.latent_shape[1], generator)

    def guide(
        self, guidance: Guidance | None, classifier: nn.Module | None, batch: Batch, images_seen: int
    ) -> Guide | None:
        """Return the guidance loss for G's batch, if the phase guides."""
        if guidance is None:
            return None
        assert classifier is not None, "params refuse guidance without a classifier"
        if batch.t is not None:
            return guide_at_times(classifier, guidance, batch.labels, batch.t)
        generator = stream_generator(self.run.seed, "guidance", images_seen)
        return guide_to_data(classifier, guidance, batch.labels, tuple(batch.source.shape), generator)


def draw_times(nfe: int | Literal["any"], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw source and target times, (N,) each: s in {1/n, ..., 1} and t = s - 1/n; any: s ~ U(0, 1), t ~ U(0, s)."""
    if nfe == "any":
        s, fraction = torch.rand(2, count, generator=generator)
        return s, s * fraction
    step = torch.randint(1, nfe + 1, (count,), generator=generator)
    return step / nfe, (step - 1) / nfe
