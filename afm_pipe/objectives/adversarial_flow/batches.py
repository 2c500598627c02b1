"""The batches of a run: latents, labels, times and noise, each a function of (seed, stream, images seen).

Every process draws the random numbers of the whole batch and takes a strided shard, `rank::world_size`; a micro-batch
is a strided shard of that. So results do not depend on the number of processes and micro-batches, and the penalized
images, the first ones of the batch, are spread evenly over them.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.data.move import to_device
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.objectives.adversarial_flow.augment import Augment, TranslateAndErase, draw_translate_and_erase
from afm_pipe.objectives.adversarial_flow.guidance import (
    GuidanceLoss,
    MultiStepGuidance,
    OneStepGuidance,
    multi_step_guidance,
    one_step_guidance,
)
from afm_pipe.objectives.adversarial_flow.losses import interpolate, step_weighting
from afm_pipe.objectives.base import Hyperparameters, num_micro_batches
from afm_pipe.params import Augmentation, Guidance, Run

Stream = Literal["discriminator", "generator"]
Draws = TypeVar("Draws", bound=tuple[Any, ...] | None)


class Batch(NamedTuple):
    """The batch of a step of G or D. In one-step generation x_s is noise, x_t is data, and there are no times."""

    real: Tensor  # (N, C, H, W), x_t: what D compares with G's output
    source: Tensor  # (N, C, H, W), x_s: G's input
    labels: Tensor  # (N,)
    s: Tensor | None = None  # (N,)
    t: Tensor | None = None  # (N,)

    @property
    def weighting(self) -> Tensor | float:
        """w(s, t), (N,); 1 in one-step generation."""
        return 1.0 if self.s is None or self.t is None else step_weighting(self.s, self.t)


class PenaltyNoise(NamedTuple):
    """Directions of the finite differences at the penalized images, the first n of the batch."""

    real: Tensor  # (n, C, H, W)
    fake: Tensor  # (n, C, H, W)


class DiscriminatorPart(NamedTuple):
    """A micro-batch of a step of D."""

    batch: Batch
    noise: PenaltyNoise | None  # None in updates without (lazy) penalties
    augment: Augment | None = None
    share: float = 1.0
    """Fraction of the whole batch: the weight of its losses, which are summed over micro-batches."""
    penalized_share: float = 1.0
    """Fraction of the penalized images."""


class GeneratorPart(NamedTuple):
    """A micro-batch of the step of G."""

    batch: Batch
    augment: Augment | None = None
    guidance: GuidanceLoss | None = None
    share: float = 1.0
    """Fraction of the whole batch."""


class Draw(NamedTuple):
    """The input of one update: the micro-batches of each step of D, and those of the step of G."""

    discriminator: Sequence[Sequence[DiscriminatorPart]]
    generator: Sequence[GeneratorPart]


class AdversarialBatches:
    """Draws the batches of G and of D, which see the data in different orders."""

    def __init__(
        self,
        latents: Latents,
        run: Run,
        classifier: nn.Module | None,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
    ) -> None:
        """Draw for one process of `group`, in micro-batches of at most `micro_batch` images; None: a single one.

        Raises UserError if there are more processes than images in a batch.
        """
        self.latents, self.run, self.classifier, self.device = latents, run, classifier, device
        self.shard = group.shard
        self.num_micro_batches = num_micro_batches(run.batch_size, group.world_size, micro_batch)
        self.labels = torch.as_tensor(latents.labels)
        self.orders = {stream: Order(latents.num_images, run.seed, stream) for stream in ("discriminator", "generator")}

    def draw(self, update: int, hyperparameters: Hyperparameters) -> Draw:
        """Return this process's micro-batches of an update, counted from 0."""
        images_seen, phase = update * self.run.batch_size, hyperparameters.phase
        assert phase is not None
        steps = self.run.discriminator_updates
        g_batch = self.batch("generator", images_seen)
        g_augment = self.augmentation(phase.augment, "generator", images_seen)
        guidance = self.guidance(phase.guidance, g_batch, images_seen)
        d_steps = []
        for step in range(steps):
            at = (update * steps + step) * self.run.batch_size
            batch = g_batch if self.run.reuse_forward else self.batch("discriminator", at)
            noise = self.penalty_noise(at, update)
            augment = self.augmentation(phase.augment, "discriminator", at)
            d_steps.append(self._discriminator_parts(batch, noise, augment))
        return Draw(d_steps, self._generator_parts(g_batch, g_augment, guidance))

    def _discriminator_parts(
        self, batch: Batch, noise: PenaltyNoise | None, augment: TranslateAndErase | None
    ) -> list[DiscriminatorPart]:
        parts = []
        for index in range(self.num_micro_batches):
            images, directions = self._part(batch, index), self._part(noise, index)
            penalized = 0 if directions is None else len(directions.real)
            shares = len(images.real) / self.run.batch_size, penalized / self._penalized
            parts.append(DiscriminatorPart(images, directions, self._part(augment, index), *shares))
        return parts

    def _generator_parts(
        self, batch: Batch, augment: TranslateAndErase | None, guidance: OneStepGuidance | MultiStepGuidance | None
    ) -> list[GeneratorPart]:
        parts = []
        for index in range(self.num_micro_batches):
            images = self._part(batch, index)
            share = len(images.real) / self.run.batch_size
            parts.append(GeneratorPart(images, self._part(augment, index), self._part(guidance, index), share))
        return parts

    def batch(self, stream: Stream, images_seen: int) -> Batch:
        """Return this process's shard of the batch of a stream at position `images_seen`."""
        count, generator = self.run.batch_size, stream_generator(self.run.seed, stream, "noise", images_seen)
        shape, shard = (count, *self.latents.latent_shape), self.shard
        indices = self.orders[stream].indices(images_seen, count)
        x = self.latents.draw(indices, generator, shard)  # (N, C, H, W)
        z = torch.randn(shape, generator=generator)[shard].contiguous()
        labels = self._noisy(self.labels[indices], stream, images_seen)[shard]
        batch = Batch(x, z, labels)
        if self.run.nfe != 1:
            s, t = (times[shard] for times in draw_times(self.run.nfe, count, generator))
            z_target = torch.randn(shape, generator=generator)[shard]  # independent of z, as released
            batch = Batch(interpolate(x, z_target, t), interpolate(x, z, s), labels, s, t)
        return to_device(batch, self.device)

    def _noisy(self, labels: Tensor, stream: Stream, images_seen: int) -> Tensor:
        """Return labels (N,), a fraction (`label_noise`) of which is replaced by random ones."""
        if not self.run.label_noise:
            return labels
        generator = stream_generator(self.run.seed, stream, "labels", images_seen)
        wrong = torch.rand(len(labels), generator=generator) < self.run.label_noise
        return torch.where(wrong, torch.randint(self.latents.num_classes, labels.shape, generator=generator), labels)

    def penalty_noise(self, images_seen: int, update: int) -> PenaltyNoise | None:
        """Return the finite-difference directions for the step of D at `images_seen`; None without penalties."""
        if update % self.run.penalty.every:
            return None
        generator = stream_generator(self.run.seed, "penalty", images_seen)
        noises = torch.randn(2, self._penalized, *self.latents.latent_shape, generator=generator)[:, self.shard]
        return to_device(PenaltyNoise(*noises), self.device)

    def augmentation(self, augment: Augmentation | None, stream: Stream, images_seen: int) -> TranslateAndErase | None:
        """Return the augmentation of D's inputs in a stream's batch, if the phase has one."""
        if augment is None:
            return None
        generator = stream_generator(self.run.seed, "augment", stream, images_seen)
        side = self.latents.latent_shape[1]
        drawn = draw_translate_and_erase(augment, self.run.batch_size, side, generator, self.shard)
        return to_device(drawn, self.device)

    def guidance(
        self, guidance: Guidance | None, batch: Batch, images_seen: int
    ) -> OneStepGuidance | MultiStepGuidance | None:
        """Return the guidance loss of G's batch, if the phase has guidance."""
        if guidance is None:
            return None
        assert self.classifier is not None, "params require a classifier for guidance"
        if batch.t is not None:
            return multi_step_guidance(self.classifier, guidance, batch.labels, batch.t)
        generator = stream_generator(self.run.seed, "guidance", images_seen)
        shape = (self.run.batch_size, *self.latents.latent_shape)
        return one_step_guidance(self.classifier, guidance, batch.labels, shape, generator, self.shard)

    def _part(self, draws: Draws, part: int) -> Draws:
        """Return the strided shard `part::num_micro_batches` of a tuple of tensors over images, or None."""
        if draws is None or self.num_micro_batches == 1:
            return draws
        shard = slice(part, None, self.num_micro_batches)
        return type(draws)(*(each[shard].contiguous() if isinstance(each, Tensor) else each for each in draws))

    @property
    def _penalized(self) -> int:
        return round(self.run.batch_size * self.run.penalty.batch_fraction)


def draw_times(nfe: int | Literal["any"], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw source and target times, (N,) each: s in {1/n, ..., 1} and t = s - 1/n; any: s ~ U(0, 1), t ~ U(0, s)."""
    if nfe == "any":
        s, fraction = torch.rand(2, count, generator=generator)
        return s, s * fraction
    step = torch.randint(1, nfe + 1, (count,), generator=generator)
    return step / nfe, (step - 1) / nfe
