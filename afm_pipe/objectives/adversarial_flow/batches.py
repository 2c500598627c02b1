"""The batches of a run: latents, labels, times and noise, each a function of (seed, stream, images seen).

What is drawn is drawn for the whole batch, whoever computes it; of that each rank takes every so-manieth image, and of
those each of its parts again every so-manieth. So nothing depends on how many ranks and parts there are, and the first
images of a batch, which are penalised, are spread evenly over them.
"""

from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.objectives.adversarial_flow.augment import DiscriminatorView, discriminator_view
from afm_pipe.objectives.adversarial_flow.guidance import GuideAtTimes, GuideToData, guide_at_times, guide_to_data
from afm_pipe.objectives.adversarial_flow.losses import interpolate
from afm_pipe.objectives.adversarial_flow.step import Batch, PenaltyNoise, Share
from afm_pipe.params import Augmentation, Guidance, Phase, Run
from afm_pipe.runtime.errors import UserError

Stream = Literal["discriminator", "generator"]
Draws = TypeVar("Draws", bound=tuple[Any, ...] | None)


class Part(NamedTuple):
    """What one D step and one G step are made from: so much of a batch as the device takes at once."""

    d_batch: Batch
    g_batch: Batch  # the same as D's where the forward pass is reused
    noise: PenaltyNoise | None
    d_view: DiscriminatorView | None
    g_view: DiscriminatorView | None
    guide: GuideToData | GuideAtTimes | None
    share: Share


class Batches:
    """Draws the batches of G and of D, which see the data in orders of their own."""

    def __init__(
        self,
        latents: Latents,
        run: Run,
        device: torch.device,
        ranks: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
    ) -> None:
        """Draw for one of `ranks`, in parts of `micro_batch` images or, left out, all at once.

        Raises UserError when there are more ranks than images in a batch.
        """
        require_images(ranks, run.batch_size)
        self.latents, self.run, self.device, self.own = latents, run, device, ranks.shard
        self.num_micro_batches = num_micro_batches(run.batch_size, ranks.world_size, micro_batch)
        self.labels = torch.as_tensor(latents.labels)
        self.orders = {stream: Order(latents.num_images, run.seed, stream) for stream in ("discriminator", "generator")}

    def parts(self, phase: Phase, classifier: nn.Module | None, images_seen: int) -> list[Part]:
        """Return this rank's parts of the update that begins when G has seen `images_seen` images."""
        g_batch = self.batch("generator", images_seen)
        d_batch = g_batch if self.run.reuse_forward else self.batch("discriminator", images_seen)
        noise = self.penalty_noise(images_seen)
        d_view, g_view = (self.view(phase.augment, stream, images_seen) for stream in ("discriminator", "generator"))
        guide = self.guide(phase.guidance, classifier, g_batch, images_seen)
        found = []
        for part in range(self.num_micro_batches):
            own_noise, own_d_batch = self._part(noise, part), self._part(d_batch, part)
            found.append(
                Part(
                    own_d_batch,
                    own_d_batch if self.run.reuse_forward else self._part(g_batch, part),
                    own_noise,
                    self._part(d_view, part),
                    self._part(g_view, part),
                    self._part(guide, part),
                    self._share(own_d_batch, own_noise),
                )
            )
        return found

    def batch(self, stream: Stream, images_seen: int) -> Batch:
        """Return this rank's share of the batch of a stream that starts when G has seen `images_seen` images."""
        count, generator = self.run.batch_size, stream_generator(self.run.seed, stream, "noise", images_seen)
        shape, own = (count, *self.latents.latent_shape), self.own
        indices = self.orders[stream].indices(images_seen, count)
        x = self.latents.draw(indices, generator, own)  # (N, C, H, W)
        z = torch.randn(shape, generator=generator)[own].contiguous()
        labels = self._asked_for(self.labels[indices], stream, images_seen)[own]
        batch = Batch(x, z, labels)
        if self.run.nfe != 1:
            s, t = (times[own] for times in draw_times(self.run.nfe, count, generator))
            z_target = torch.randn(shape, generator=generator)[own]  # independent of z, as released
            batch = Batch(interpolate(x, z_target, t), interpolate(x, z, s), labels, s, t)
        return batch.to(self.device)

    def _asked_for(self, labels: Tensor, stream: Stream, images_seen: int) -> Tensor:
        """Return the labels (N,) of a batch with the run's share of them replaced by random ones."""
        if not self.run.label_noise:
            return labels
        generator = stream_generator(self.run.seed, stream, "labels", images_seen)
        wrong = torch.rand(len(labels), generator=generator) < self.run.label_noise
        return torch.where(wrong, torch.randint(self.latents.num_classes, labels.shape, generator=generator), labels)

    def penalty_noise(self, images_seen: int) -> PenaltyNoise | None:
        """Return the directions of the finite differences for the D step at `images_seen`, if it has penalties."""
        if images_seen // self.run.batch_size % self.run.penalty.every:
            return None
        generator = stream_generator(self.run.seed, "penalty", images_seen)
        noises = torch.randn(2, self._penalised, *self.latents.latent_shape, generator=generator)[:, self.own]
        return PenaltyNoise(*noises.to(self.device, non_blocking=True))

    def view(self, augment: Augmentation | None, stream: Stream, images_seen: int) -> DiscriminatorView | None:
        """Return how D sees the latents of a stream's batch, if the phase augments them."""
        if augment is None:
            return None
        generator = stream_generator(self.run.seed, "augment", stream, images_seen)
        return discriminator_view(augment, self.run.batch_size, self.latents.latent_shape[1], generator, self.own)

    def guide(
        self, guidance: Guidance | None, classifier: nn.Module | None, batch: Batch, images_seen: int
    ) -> GuideToData | GuideAtTimes | None:
        """Return the guidance loss for G's batch, if the phase guides."""
        if guidance is None:
            return None
        assert classifier is not None, "params refuse guidance without a classifier"
        if batch.t is not None:
            return guide_at_times(classifier, guidance, batch.labels, batch.t)
        generator = stream_generator(self.run.seed, "guidance", images_seen)
        shape = (self.run.batch_size, *self.latents.latent_shape)
        return guide_to_data(classifier, guidance, batch.labels, shape, generator, self.own)

    def _part(self, draws: Draws, part: int) -> Draws:
        """Return the strided shard `part::num_micro_batches` of draws that are tensors over images, or None."""
        if draws is None or self.num_micro_batches == 1:
            return draws
        chosen = (each[part :: self.num_micro_batches] if isinstance(each, Tensor) else each for each in draws)
        return type(draws)(*(each.contiguous() if isinstance(each, Tensor) else each for each in chosen))

    @property
    def _penalised(self) -> int:
        return round(self.run.batch_size * self.run.penalty.batch_fraction)

    def _share(self, batch: Batch, noise: PenaltyNoise | None) -> Share:
        penalised = 0 if noise is None else len(noise.real)
        return Share(len(batch.real) / self.run.batch_size, penalised / self._penalised)


def num_micro_batches(batch_size: int, ranks: int, micro_batch: int | None) -> int:
    """Return in how many parts each rank computes its share of a batch."""
    share = -(-batch_size // ranks)  # of the rank that has most
    parts = 1 if micro_batch is None else -(-share // micro_batch)
    return max(min(parts, batch_size // ranks), 1)  # no part is empty


def require_images(ranks: ProcessGroup, batch_size: int) -> None:
    """Raise UserError when there are more ranks than images in a batch."""
    if ranks.world_size > batch_size:
        raise UserError(
            f"Found {ranks.world_size} ranks for a batch of {batch_size} images, expected no more than that: start "
            "fewer processes, or raise batch_size."
        )


def draw_times(nfe: int | Literal["any"], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw source and target times, (N,) each: s in {1/n, ..., 1} and t = s - 1/n; any: s ~ U(0, 1), t ~ U(0, s)."""
    if nfe == "any":
        s, fraction = torch.rand(2, count, generator=generator)
        return s, s * fraction
    step = torch.randint(1, nfe + 1, (count,), generator=generator)
    return step / nfe, (step - 1) / nfe
