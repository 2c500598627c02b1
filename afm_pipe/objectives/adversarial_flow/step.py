"""The gradients of D's loss and of G's on a batch, or on a part of one (paper section 3).

With a forward pass of G on one batch as the unit, the two together cost 14.5 units (paper Table 12). A batch in parts,
on one device after the other or on several at once, is put together in `update.py`.

Shapes: N images of the part, n penalised ones, C, H, W of latents.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from afm_pipe.models.flow import Flow
from afm_pipe.objectives.adversarial_flow.augment import View
from afm_pipe.objectives.adversarial_flow.losses import (
    DiscriminatorTerms,
    GeneratorTerms,
    Logits,
    discriminator_terms,
    moved,
    relativistic,
    step_weighting,
    transport_cost,
)
from afm_pipe.objectives.adversarial_flow.normalizer import GradientNormalizer
from afm_pipe.params import Run


class Guide(Protocol):
    """A weighted loss of G's output."""

    def __call__(self, output: Tensor) -> Tensor:
        """Return the loss of G's output (N, C, H, W)."""


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


class Share(NamedTuple):
    """How much of the whole batch a part is. Its losses weigh that much, so that over the parts they add up."""

    batch: float = 1.0
    penalised: float = 1.0  # of what is penalised


WHOLE = Share()


class DiscriminatorStep(NamedTuple):
    """Outcome of a D step, weighed by the part's share; the gradients are in D's parameters."""

    total: Tensor
    terms: DiscriminatorTerms
    logits: Logits


class OutputGradients(NamedTuple):
    """The gradients of G's loss at G's output, weighed by the part's share."""

    adversarial: Tensor  # (N, C, H, W), to be normalised
    others: Tensor  # (N, C, H, W), of transport and guidance
    terms: GeneratorTerms
    square_move: Tensor  # mean square of G(x_s) - x_s
    square_output: Tensor  # of G(x_s)
    square_real: Tensor  # of x_t
    fake: Tensor | None  # G's output with its graph; None where it is not kept


class GeneratorStep(NamedTuple):
    """Outcome of a G step; the gradients are in G's parameters."""

    total: Tensor
    terms: GeneratorTerms
    transport_rms: Tensor  # rms(G(x_s) - x_s)


def discriminator_step(
    generator: Flow,
    discriminator: nn.Module,
    batch: Batch,
    noise: PenaltyNoise | None,
    run: Run,
    view: View | None = None,
    fake: Tensor | None = None,
    share: Share = WHOLE,
) -> DiscriminatorStep:
    """Add the gradients of D's loss to D's parameters, by one D forward over 2 N + 2 n latents.

    `view` is how D sees latents, real and generated alike, where they are augmented. `fake` (N, C, H, W) is G's output
    on the batch where it is at hand. Without `noise` the update is one that lazy penalties leave out: n = 0.
    """
    real, labels, t, weighting = batch.real, batch.labels, batch.t, batch.weighting
    if fake is None:
        with torch.no_grad():
            fake = generator(batch.source, labels, batch.s, t)  # (N, C, H, W)
    fake, source = fake.detach(), batch.source
    if view is not None:
        real, fake, source = view(real), view(fake), view(source)
    epsilon, n = run.penalty.epsilon, 0 if noise is None else len(noise.real)
    everything = [real, fake]
    if noise is not None:
        everything += [moved(real[:n], noise.real, epsilon), moved(fake[:n], noise.fake, epsilon)]
    times = None if t is None else _four(t, n)
    logits = discriminator(torch.cat(everything), _four(labels, n), times, _four(source, n))  # (2 N + 2 n,)
    split = Logits(*logits.split([len(real), len(fake), n, n]))
    terms = discriminator_terms(split, epsilon, weighting if isinstance(weighting, float) else weighting[:n])
    # Lazy penalties weigh more where they are computed, so that their mean over updates is the penalty's.
    penalised = run.penalty.every * share.penalised
    terms = DiscriminatorTerms(
        adversarial=share.batch * terms.adversarial,
        r1=penalised * terms.r1,
        r2=penalised * terms.r2,
        logit_centering=share.batch * terms.logit_centering,
    )
    total = terms.adversarial + run.penalty.weight * (terms.r1 + terms.r2) + run.logit_centering * terms.logit_centering
    total.backward()
    return DiscriminatorStep(total.detach(), DiscriminatorTerms(*(term.detach() for term in terms)), split)


def generator_step(
    generator: Flow,
    discriminator: nn.Module,
    batch: Batch,
    transport_weight: float,
    normalizer: GradientNormalizer | None,
    view: View | None = None,
    guide: Guide | None = None,
    fake: Tensor | None = None,
) -> GeneratorStep:
    """Add the gradients of G's loss on a whole batch to G's parameters.

    The adversarial gradient is taken at G's output first, normalised there, joined by the gradients of the transport
    loss and of `guide` (a weighted loss of G's output), and all go through G in one backward pass. `view` and `fake`
    are as in the D step, `fake` with its graph. D's parameters must not require gradients.
    """
    if fake is None:
        fake = generator(batch.source, batch.labels, batch.s, batch.t)  # (N, C, H, W)
    at_output = output_gradients(discriminator, batch, transport_weight, fake, view, guide)
    gradient = at_output.adversarial
    if normalizer is not None:
        gradient = normalizer(gradient)
    fake.backward(gradient + at_output.others)
    terms = at_output.terms
    return GeneratorStep(generator_total(terms, transport_weight), terms, at_output.square_move.sqrt())


def output_gradients(
    discriminator: nn.Module,
    batch: Batch,
    transport_weight: float,
    fake: Tensor,
    view: View | None = None,
    guide: Guide | None = None,
    share: Share = WHOLE,
) -> OutputGradients:
    """Return the gradients of G's loss at G's output `fake` (N, C, H, W), on a batch or a part of one."""
    output = fake.detach().requires_grad_()
    real, seen, source = batch.real, output, batch.source
    if view is not None:
        real, seen, source = view(real), view(output), view(source)
    with torch.no_grad():
        real_logits = discriminator(real, batch.labels, batch.t, source)
    adversarial = share.batch * relativistic(discriminator(seen, batch.labels, batch.t, source), real_logits)
    (gradient,) = torch.autograd.grad(adversarial, output)
    transport = share.batch * transport_cost(output, batch.source, batch.weighting)
    guidance = torch.zeros_like(transport) if guide is None else share.batch * guide(output)
    (others,) = torch.autograd.grad(transport_weight * transport + guidance, output)
    return OutputGradients(
        adversarial=gradient,
        others=others,
        terms=GeneratorTerms(adversarial.detach(), transport.detach(), guidance.detach()),
        square_move=share.batch * (output.detach() - batch.source).square().mean(),
        square_output=share.batch * output.detach().square().mean(),
        square_real=share.batch * batch.real.square().mean(),
        fake=fake if fake.requires_grad else None,
    )


def generator_total(terms: GeneratorTerms, transport_weight: float) -> Tensor:
    """Return G's loss."""
    return terms.adversarial + transport_weight * terms.transport + terms.guidance


def _four(values: Tensor, n: int) -> Tensor:
    """Repeat what belongs to a batch (N,) for its four parts in D's forward: real, fake, and n of each moved."""
    return torch.cat([values, values, values[:n], values[:n]])
