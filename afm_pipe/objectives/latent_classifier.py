"""Training of the guidance classifier: cross entropy on latents at random noise levels (paper section 3).

This departs from the paper in the affine augmentation, which applies to latents, with reflection padding, since images
are encoded once; the paper augments images and then encodes them.

Shapes: N latents of a micro-batch, C, H, W of latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.data.move import to_device
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.objectives.adversarial_flow.augment import draw_affine
from afm_pipe.objectives.adversarial_flow.losses import interpolate
from afm_pipe.objectives.base import Hyperparameters, Learner, Objective, Sampler, Term, num_micro_batches
from afm_pipe.params import Classifier, Ema
from afm_pipe.params.sizes import SIZES

LEVELS = (0.0, 0.1, 0.25, 0.5)  # noise times at which accuracy is measured
NUM_MEASURED = 2000  # latents on which accuracy is measured


@dataclass(frozen=True)
class Settings:
    """Settings of the classifier's training run."""

    classifier: Classifier
    seed: int
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def batch_size(self) -> int:
        return self.classifier.batch_size

    @property
    def ema(self) -> Ema:
        return self.classifier.ema


class NoisyLatents(NamedTuple):
    """A micro-batch of noisy latents."""

    x: Tensor  # (N, C, H, W), noisy latents
    t: Tensor  # (N,), noise times
    labels: Tensor  # (N,)
    share: float  # fraction of the batch


class ClassifierBatches:
    """Draws noisy latents as a function of (seed, update)."""

    def __init__(
        self, settings: Settings, latents: Latents, device: torch.device, group: ProcessGroup, micro_batch: int | None
    ) -> None:
        self.settings, self.latents, self.device, self.shard = settings, latents, device, group.shard
        self.num_micro_batches = num_micro_batches(settings.batch_size, group.world_size, micro_batch)
        self.order = Order(latents.num_images, settings.seed, "classifier")
        self.labels = torch.as_tensor(latents.labels)

    def draw(self, update: int, hyperparameters: Hyperparameters) -> list[NoisyLatents]:
        """Return this process's micro-batches of an update, counted from 0."""
        count, shard, affine = self.settings.batch_size, self.shard, self.settings.classifier.affine
        indices = self.order.indices(update * count, count)
        generator = stream_generator(self.settings.seed, "classifier", "noise", update)
        x = self.latents.draw(indices, generator, shard)
        maps = None if affine is None else draw_affine(affine, count, generator, shard)
        t = torch.rand(count, generator=generator)[shard]
        z = torch.randn(count, *self.latents.latent_shape, generator=generator)[shard]
        x, t, z, labels = to_device((x, t, z, self.labels[indices[shard]]), self.device)
        if maps is not None:
            x = to_device(maps, self.device)(x)
        noisy, parts = interpolate(x, z, t), self.num_micro_batches
        shards = [slice(index, None, parts) for index in range(parts)]
        return [NoisyLatents(noisy[at], t[at], labels[at], len(t[at]) / count) for at in shards]


class ClassifierTraining(Objective):
    """Trains the time-conditioned classifier C(x_t, t)."""

    name = "latent_classifier"
    terms = (Term("cross_entropy", "Cross entropy", "At random noise levels", log=True),)
    sampled = "classifier"

    def __init__(self, params: Classifier, seed: int, latent_shape: tuple[int, int, int], num_classes: int) -> None:
        """Train a classifier of latents of `latent_shape` (C, H, W)."""
        self.settings: Settings = Settings(params, seed)
        self.params, self.latent_shape, self.num_classes = params, latent_shape, num_classes

    def build_networks(self) -> dict[str, nn.Module]:
        channels, side, _ = self.latent_shape
        return {"classifier": LatentClassifier(SIZES[self.params.size], channels, side, self.num_classes)}

    def optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        params = self.params
        return torch.optim.AdamW(
            network.parameters(), lr=params.lr, betas=params.betas, weight_decay=params.weight_decay, fused=True
        )

    def num_updates(self, num_images: int) -> int:
        return -(-round(self.params.epochs * num_images) // self.params.batch_size)

    def hyperparameters(self, update: int, num_images: int, clock: float | None = None) -> Hyperparameters:
        return Hyperparameters({"classifier": self.params.lr}, {})

    def batches(
        self,
        latents: Latents,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
    ) -> ClassifierBatches:
        return ClassifierBatches(self.settings, latents, device, group, micro_batch)

    def update(self, learner: Learner, batch: Sequence[NoisyLatents], hyperparameters: Hyperparameters) -> Tensor:
        losses = []
        for index, part in enumerate(batch):
            with learner.accumulate("classifier", index == len(batch) - 1):
                logits = learner.module("classifier")(part.x, part.t)
                loss = part.share * F.cross_entropy(logits, part.labels)
                loss.backward()
            losses.append(loss.detach()[None])
        total = learner.sum(losses)
        learner.step("classifier", total[0], hyperparameters)
        return total

    def sampler(self, network: nn.Module) -> Sampler:
        raise TypeError("a classifier does not draw samples")

    def example_batch(self, count: int, penalized: int | None = None) -> list[NoisyLatents]:
        labels = torch.zeros(count, dtype=torch.int64)
        return [NoisyLatents(torch.empty(count, *self.latent_shape), torch.empty(count), labels, 1.0)]

    def example_forward(self, networks: Mapping[str, nn.Module], count: int) -> Tensor:
        (part,) = self.example_batch(count)
        return networks["classifier"](part.x, part.t)

    def progress(self, row: Mapping[str, float]) -> str:
        return f"cross entropy {row['cross_entropy']:.3f}"


@torch.no_grad()
def accuracy_by_level(model: nn.Module, latents: Latents, seed: int, device: torch.device) -> dict[str, float]:
    """Return the accuracy on noisy training latents by noise time, under the names accuracy_tTIME."""
    generator = stream_generator(seed, "classifier", "accuracy")
    indices = torch.randperm(latents.num_images, generator=generator)[:NUM_MEASURED]
    x, labels = latents.draw(indices, generator), torch.as_tensor(latents.labels)[indices]
    z = torch.randn(x.shape, generator=generator)
    model.eval()
    accuracy = {}
    for level in LEVELS:
        t = torch.full((len(x),), level)
        noisy = interpolate(x, z, t)
        correct = [
            (model(part.to(device), at.to(device)).argmax(1).cpu() == truth).sum().item()
            for part, at, truth in zip(noisy.split(100), t.split(100), labels.split(100), strict=True)
        ]
        accuracy[f"accuracy_t{level:g}"] = sum(correct) / len(x)
    return accuracy
