"""One D update's and one G update's gradients (paper section 3), on one device.

With a forward pass of G on one batch as the unit, the two together cost 14.5 units (paper Table 12).

Shapes: N batch, n its penalised part, C, H, W of latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from afm_pipe.models.flow import Flow
from afm_pipe.params import Run
from afm_pipe.training.gradient_norm import GradientNormalizer
from afm_pipe.training.losses import (
    DiscriminatorTerms,
    GeneratorTerms,
    Logits,
    discriminator_terms,
    moved,
    relativistic,
    step_weighting,
    transport_cost,
)


class Batch(NamedTuple):
    """What one update of G or D is made from. In one step x_s is noise, x_t is data, and there are no times."""

    real: Tensor  # (N, C, H, W), x_t: what D compares G's output with
    source: Tensor  # (N, C, H, W), x_s: G's input
    labels: Tensor  # (N,)
    s: Tensor | None = None  # (N,)
    t: Tensor | None = None  # (N,)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore[arg-type]

    @property
    def weighting(self) -> Tensor | float:
        """w(s, t), (N,), or 1 in one step."""
        return 1.0 if self.s is None or self.t is None else step_weighting(self.s, self.t)


class PenaltyNoise(NamedTuple):
    """Directions in which D is asked again, for the penalised first part of the batch."""

    real: Tensor  # (n, C, H, W)
    fake: Tensor  # (n, C, H, W)


class DiscriminatorStep(NamedTuple):
    """Outcome of a D step; the gradients are in D's parameters."""

    total: Tensor
    terms: DiscriminatorTerms
    logits: Logits


class GeneratorStep(NamedTuple):
    """Outcome of a G step; the gradients are in G's parameters."""

    total: Tensor
    terms: GeneratorTerms
    move_rms: Tensor  # rms(G(x_s) - x_s)


def discriminator_step(
    generator: Flow, discriminator: nn.Module, batch: Batch, noise: PenaltyNoise, run: Run
) -> DiscriminatorStep:
    """Add the gradients of D's loss to D's parameters, by one D forward over 2 N + 2 n latents."""
    real, labels, t, weighting = batch.real, batch.labels, batch.t, batch.weighting
    with torch.no_grad():
        fake = generator(batch.source, labels, batch.s, t)  # (N, C, H, W)
    n, epsilon = len(noise.real), run.penalty.epsilon
    everything = [real, fake, moved(real[:n], noise.real, epsilon), moved(fake[:n], noise.fake, epsilon)]
    logits = discriminator(torch.cat(everything), _four(labels, n), None if t is None else _four(t, n))  # (2 N + 2 n,)
    split = Logits(*logits.split([len(part) for part in everything]))
    terms = discriminator_terms(split, epsilon, weighting if isinstance(weighting, float) else weighting[:n])
    total = terms.adversarial + run.penalty.weight * (terms.r1 + terms.r2) + run.centring * terms.centring
    total.backward()
    return DiscriminatorStep(total.detach(), DiscriminatorTerms(*(term.detach() for term in terms)), split)


def generator_step(
    generator: Flow,
    discriminator: nn.Module,
    batch: Batch,
    transport_weight: float,
    normalizer: GradientNormalizer | None,
) -> GeneratorStep:
    """Add the gradients of G's loss to G's parameters.

    The adversarial gradient is taken at G's output first, normalised there, joined by the transport gradient, and
    both go through G in one backward pass. D's parameters must not require gradients.
    """
    fake = generator(batch.source, batch.labels, batch.s, batch.t)  # (N, C, H, W)
    with torch.no_grad():
        real_logits = discriminator(batch.real, batch.labels, batch.t)
    output = fake.detach().requires_grad_()
    adversarial = relativistic(discriminator(output, batch.labels, batch.t), real_logits)
    (gradient,) = torch.autograd.grad(adversarial, output)
    if normalizer is not None:
        gradient = normalizer(gradient)
    transport = transport_cost(output, batch.source, batch.weighting)
    (pull,) = torch.autograd.grad(transport_weight * transport, output)
    fake.backward(gradient + pull)
    terms = GeneratorTerms(adversarial.detach(), transport.detach())
    move_rms = (output.detach() - batch.source).square().mean().sqrt()
    return GeneratorStep(terms.adversarial + transport_weight * terms.transport, terms, move_rms)


def _four(values: Tensor, n: int) -> Tensor:
    """Repeat what belongs to a batch (N,) for its four parts in D's forward: real, fake, and n of each moved."""
    return torch.cat([values, values, values[:n], values[:n]])
