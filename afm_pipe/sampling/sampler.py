"""Draw samples by index: noise to latents to images.

Legend: N samples, c latent channels, h = w latent side, C image channels, H = W image side.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.distributed.mapping import map_across_ranks
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.flow import Flow
from afm_pipe.models.velocity import VelocityFlow
from afm_pipe.runtime.errors import UserError

LATENCY_RUNS, LATENCY_SECONDS = 5, 10.0  # timed passes: five, or fewer if they take longer than ten seconds
CPU = torch.device("cpu")


def seeded_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw noise by index: sample i has its own generator, seeded with seed + i (paper section 5).

    Returns (N, *shape) float32 on the CPU, whose random numbers are the same on every machine.
    """
    drawn = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed + i)) for i in indices]
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)


def balanced_labels(indices: Sequence[int], num_classes: int) -> Tensor:
    """Return the class of each index, cycling through the classes: (N,) int64. Equal shares lower FID by about 0.1."""
    return torch.tensor([i % num_classes for i in indices], dtype=torch.int64)


def labels_in_shares(count: int, class_counts: Sequence[int]) -> Tensor:
    """Return the classes of samples 0, 1, ... in the shares of `class_counts` (K,): (count,) int64.

    Each sample is of the class that lags most behind its share, so the first n are in these shares for every n; equal
    counts give classes in turn.
    """
    if len(set(class_counts)) == 1:
        return balanced_labels(range(count), len(class_counts))
    shares = np.array(class_counts, np.int64)
    total, lag, labels = int(shares.sum()), np.zeros_like(shares), np.empty(count, np.int64)
    for index in range(count):
        lag += shares
        labels[index] = lag.argmax()
        lag[labels[index]] -= total
    return torch.from_numpy(labels)


def slerp(first: Tensor, second: Tensor, fraction: float) -> Tensor:
    """Interpolate spherically between two noise tensors of one shape."""
    a, b = first.flatten().double(), second.flatten().double()
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle < 1e-6:
        return first.clone()
    mixed = (torch.sin((1 - fraction) * angle) * a + torch.sin(fraction * angle) * b) / torch.sin(angle)
    return mixed.view_as(first).to(first.dtype)


@dataclass(frozen=True)
class Sampler:
    """A generator and an autoencoder that draw samples by index.

    Convolutions and matrix products round differently at other batch sizes and positions. Every forward pass therefore
    has the size `micro_batch`, and sample i takes slot i % micro_batch; unused slots hold zeros. So image i depends
    only on the weights, its noise and its class.

    `noise` below is a seed (see `seeded_noise`) or a tensor (F, c, h, w), where sample i starts from noise[i % F].
    `steps` is that of the generator's `sample`.
    """

    generator: Flow | VelocityFlow
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    class_names: Sequence[str]
    micro_batch: int
    device: torch.device = CPU
    group: ProcessGroup = SINGLE_PROCESS

    def latents(self, indices: Sequence[int], labels: Tensor, noise: int | Tensor, steps: int | None = None) -> Tensor:
        """Generate the latents of samples in any order: (N, c, h, w) float32.

        Raises UserError for a non-finite latent.
        """
        latents = torch.empty(len(indices), *self.latent_shape, device=self.device)
        for positions, slots, batch in self._generate(indices, labels, noise, steps):
            latents[positions] = batch[slots]
        return latents

    def images(self, indices: Sequence[int], labels: Tensor, noise: int | Tensor, steps: int | None = None) -> Tensor:
        """Generate samples in any order and decode them: (N, C, H, W) uint8 on the CPU.

        Raises UserError for a non-finite latent or image.
        """
        order, images = [], []
        for positions, slots, batch in self._generate(indices, labels, noise, steps):
            order += positions
            images.append(self._decode(batch)[slots].cpu())  # decodes all slots: rounding depends on the batch size
        return torch.cat(images)[torch.tensor(order).argsort()]

    def stream(self, labels: Tensor, noise: int | Tensor, steps: int | None = None) -> Iterator[Tensor]:
        """Yield samples 0, 1, ... of classes `labels` (N,), a micro-batch (B, C, H, W) uint8 at a time.

        Every process of the group calls this and computes a share; the main process gets all images, in order, the
        others none. Memory does not grow with N.
        """

        def compute(indices: range) -> list[Tensor]:
            return [self.images(indices, labels[indices.start : indices.stop], noise, steps)]

        for _, (images,) in map_across_ranks(self.micro_batches(range(len(labels))), compute, self.group):
            yield images

    def micro_batches(self, indices: range) -> list[range]:
        """Split indices into micro-batches; the first index must belong to slot 0."""
        return [indices[start : start + self.micro_batch] for start in range(0, len(indices), self.micro_batch)]

    @torch.inference_mode()
    def latency(self, steps: int) -> float:
        """Return the median seconds from noise to one latent, batch 1, after one warm-up pass; without decoding."""
        z = seeded_noise(0, [0], self.latent_shape).to(self.device)
        label, seconds = torch.zeros(1, dtype=torch.int64, device=self.device), []
        for _ in range(LATENCY_RUNS + 1):
            started = time.perf_counter()
            self.generator.sample(z, label, steps)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
            if sum(seconds) > LATENCY_SECONDS:
                break
        return statistics.median(seconds[1:] or seconds)

    @torch.inference_mode()
    def _generate(
        self, indices: Sequence[int], labels: Tensor, noise: int | Tensor, steps: int | None
    ) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Yield positions in `indices`, their slots, and the latents of all slots, one micro-batch at a time.

        A repeated index, for example with another class, goes into another micro-batch.
        """
        batches: dict[tuple[int, int], list[int]] = {}
        repeats: dict[int, int] = {}
        for position, index in enumerate(indices):
            repeats[index] = repeats.get(index, -1) + 1
            batches.setdefault((index // self.micro_batch, repeats[index]), []).append(position)
        for positions in batches.values():
            chosen = [indices[position] for position in positions]
            slots = [index % self.micro_batch for index in chosen]
            z = torch.zeros(self.micro_batch, *self.latent_shape)
            if isinstance(noise, int):
                z[slots] = seeded_noise(noise, chosen, self.latent_shape)
            else:
                z[slots] = noise[[index % len(noise) for index in chosen]]
            classes = torch.zeros(self.micro_batch, dtype=torch.int64)
            classes[slots] = labels[positions]
            latents = self.generator.sample(z.to(self.device), classes.to(self.device), steps).float()
            finite = latents[slots].flatten(1).isfinite().all(dim=1)
            if not finite.all():
                raise UserError(
                    f"Found a non-finite latent (sample {chosen[int(finite.int().argmin())]}), expected finite values: "
                    "the generator has diverged; train it again with a lower lr or a higher transport weight."
                )
            yield positions, slots, latents

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> Tensor:
        images = self.autoencoder.decode(latents)
        if not images.isfinite().all():
            raise UserError("Found non-finite decoded images, expected finite values: train the autoencoder again.")
        return self.autoencoder.spec.to_uint8(images)
