"""One D update's and one G update's gradients (paper section 3), on one device."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from afm_pipe.params import Run
from afm_pipe.training.gradient_norm import GradientNormalizer
from afm_pipe.training.losses import (
    DiscriminatorTerms,
    GeneratorTerms,
    Logits,
    discriminator_terms,
    moved,
    relativistic,
    transport_cost,
)


class Batch(NamedTuple):
    """What one update of G or D is made from."""

    latents: Tensor  # (N, C, H, W)
    labels: Tensor  # (N,)
    noise: Tensor  # (N, C, H, W), G's input


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
    move_rms: Tensor  # rms(G(z) - z)


def discriminator_step(
    generator: nn.Module, discriminator: nn.Module, batch: Batch, noise: PenaltyNoise, run: Run
) -> DiscriminatorStep:
    """Add the gradients of D's loss to D's parameters: one D forward over 2 + 2 share batches (14.5 units: 10 here)."""
    with torch.no_grad():
        fake = generator(batch.noise, batch.labels)  # (N, C, H, W)
    real, labels = batch.latents, batch.labels
    n, penalised = len(real), len(noise.real)
    everything = [
        real,
        fake,
        moved(real[:penalised], noise.real, run.penalty.epsilon),
        moved(fake[:penalised], noise.fake, run.penalty.epsilon),
    ]
    logits = discriminator(
        torch.cat(everything), torch.cat([labels, labels, labels[:penalised], labels[:penalised]])
    )  # (2 N + 2 n,)
    split = Logits(*logits.split([n, n, penalised, penalised]))
    terms = discriminator_terms(split, run.penalty.epsilon)
    total = terms.adversarial + run.penalty.weight * (terms.r1 + terms.r2) + run.centring * terms.centring
    total.backward()
    return DiscriminatorStep(total.detach(), DiscriminatorTerms(*(term.detach() for term in terms)), split)


def generator_step(
    generator: nn.Module,
    discriminator: nn.Module,
    batch: Batch,
    run: Run,
    transport_weight: float,
    normalizer: GradientNormalizer | None,
) -> GeneratorStep:
    """Add the gradients of G's loss to G's parameters.

    The adversarial gradient is taken at G's output first, normalised there, joined by the transport gradient, and
    both go through G in one backward pass. D's parameters must not require gradients.
    """
    fake = generator(batch.noise, batch.labels)  # (N, C, H, W)
    with torch.no_grad():
        real_logits = discriminator(batch.latents, batch.labels)
    output = fake.detach().requires_grad_()
    adversarial = relativistic(discriminator(output, batch.labels), real_logits)
    (gradient,) = torch.autograd.grad(adversarial, output)
    if normalizer is not None:
        gradient = normalizer(gradient)
    transport = transport_cost(output, batch.noise)
    (pull,) = torch.autograd.grad(transport_weight * transport, output)
    fake.backward(gradient + pull)
    terms = GeneratorTerms(adversarial.detach(), transport.detach())
    return GeneratorStep(terms.adversarial + transport_weight * terms.transport, terms, terms.transport.sqrt())
