"""Adversarial flow models: a GAN whose generator is tied to the optimal transport map (paper section 3).

An update is a step of D, then a step of G; together they cost 14.5 forward passes of G (paper Table 12). Losses are
means over the batch: each micro-batch is weighted by its share, so gradients and logged values are sums over
micro-batches and processes. G's adversarial gradient is normalized by a number that depends on the whole batch, so the
gradients at G's output are computed for all micro-batches before those of G's weights.

Shapes: N images of a micro-batch, n penalized ones, C, H, W of latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.dit import in_float32
from afm_pipe.models.flow import transport_map
from afm_pipe.models.model_files import build_discriminator, build_generator
from afm_pipe.objectives import register
from afm_pipe.objectives.adversarial_flow.batches import (
    AdversarialBatches,
    Batch,
    DiscriminatorPart,
    Draw,
    GeneratorPart,
    PenaltyNoise,
)
from afm_pipe.objectives.adversarial_flow.losses import Logits, perturb, relativistic
from afm_pipe.objectives.adversarial_flow.normalizer import divisor
from afm_pipe.objectives.adversarial_flow.terms import D_TERMS, G_ADVERSARIAL, G_TERMS, DLossInputs, GLossInputs
from afm_pipe.objectives.base import Hyperparameters, Learner, Term
from afm_pipe.objectives.of_runs import RunObjective
from afm_pipe.objectives.schedules import phase_at, transport_at, transport_decayed


class OutputGradients(NamedTuple):
    """The gradients of G's loss at G's output on a micro-batch, weighted by its share."""

    adversarial: Tensor  # (N, C, H, W), gradient of the adversarial loss at D's input, not yet normalized
    d_input: Tensor  # (N, C, H, W), D's input: `leaf`, or its augmentation with the graph
    leaf: Tensor  # (N, C, H, W), G's output without G's graph
    others: Tensor  # (N, C, H, W), gradient of transport and guidance at G's output
    losses: Tensor  # (terms,), unweighted
    squares: Tensor  # (3,), mean squares of G(x_s) - x_s, of G(x_s), of x_t
    output: Tensor | None  # G's output with G's graph; None if the graph is not kept


@register
class AdversarialFlow(RunObjective):
    """The adversarial flow objective, for one run and model."""

    name = "adversarial_flow"
    terms = (
        *(each.term for each in D_TERMS),
        Term("logit_gap", "Logit gap", "Mean D(x) − D(G(z)): how well D separates real from generated"),
        Term(
            "d_accuracy",
            "Discriminator accuracy",
            "Share of pairs with D(x) > D(G(z)); 0.5: indistinguishable",
            role="d_accuracy",
        ),
        Term("d_grad_norm", "Discriminator's gradient norm", "Log scale", log=True),
        G_ADVERSARIAL,
        *(each.term for each in G_TERMS),
        Term("transport_rms", "Transport distance", "rms(G(z) − z); 0: G returns its noise", role="transport_distance"),
        Term(
            "output_scale",
            "Size of samples",
            "rms(G(z)) over rms(x): far above 1, the run diverges",
            role="output_scale",
        ),
        Term("g_adv_output_grad_norm", "Adversarial gradient at what D sees", "Before normalization", log=True),
        Term("g_transport_output_grad_norm", "Transport gradient at G's output", "With guidance's, if any", log=True),
        Term("g_grad_norm", "Generator's gradient norm", "Log scale", log=True),
    )
    scheduled = (Term("transport", "Transport weight", "λ_ot, as scheduled"),)
    adversary = "discriminator"

    def build_networks(self) -> dict[str, nn.Module]:
        return {"generator": build_generator(self.config), "discriminator": build_discriminator(self.config)}

    def build_buffers(self, device: torch.device) -> dict[str, Tensor]:
        return {"mean_square": torch.zeros((), device=device)}  # running mean of the gradient normalization

    def hyperparameters(self, update: int, num_images: int, clock: float | None = None) -> Hyperparameters:
        phase = phase_at(self.run, update, num_images)
        weight = transport_at(self.run, update, num_images, clock)
        lr = phase.lr or self.run.lr
        rates = {"generator": lr, "discriminator": phase.lr_discriminator or lr}
        return Hyperparameters(rates, {"transport": weight}, phase.gradient_clip, phase)

    def decayed(self, update: int, num_images: int, clock: float) -> bool:
        return transport_decayed(self.run, update, num_images, clock)

    def batches(
        self,
        latents: Latents,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
    ) -> AdversarialBatches:
        return AdversarialBatches(latents, self.run, self.classifier, device, group, micro_batch)

    def progress(self, row: Mapping[str, float]) -> str:
        return f"logit gap {row['logit_gap']:.2f}  transport {row['transport_rms']:.2f}"

    def update(self, learner: Learner, batch: Draw, hyperparameters: Hyperparameters) -> Tensor:
        g_parts = batch.generator
        # Reusing one forward pass of G for both steps keeps its graph in memory: only with a single micro-batch.
        reused = self.run.reuse_forward and len(g_parts) == 1
        output = self._generate(learner.module("generator"), g_parts[0].batch) if reused else None
        for d_parts in batch.discriminator:
            d_values = self._update_discriminator(learner, d_parts, hyperparameters, output)
        discriminator = learner.networks["discriminator"].requires_grad_(False)
        g_values = self._update_generator(learner, g_parts, hyperparameters, output)
        discriminator.requires_grad_(True)
        return torch.cat([d_values, g_values])

    def example_batch(self, count: int, penalized: int | None = None) -> Draw:
        if penalized is None:
            penalized = max(round(count * self.run.penalty.batch_fraction), 1)
        latents = torch.empty(count, *self.config.latent_shape)
        times = (None, None) if self.config.nfe == 1 else (torch.empty(count), torch.empty(count))
        batch = Batch(latents, torch.empty_like(latents), torch.zeros(count, dtype=torch.int64), *times)
        noise = PenaltyNoise(torch.empty_like(latents[:penalized]), torch.empty_like(latents[:penalized]))
        part = DiscriminatorPart(batch, noise if penalized else None)
        return Draw([[part]] * self.run.discriminator_updates, [GeneratorPart(batch)])

    def example_updates(self, count: int, penalized: int | None = None) -> list[tuple[Any, float]]:
        every = self.run.penalty.every  # lazy penalties
        unpenalized = [(self.example_batch(count, 0), 1 - 1 / every)] if every > 1 else []
        return [(self.example_batch(count, penalized), 1 / every), *unpenalized]

    def example_forward(self, networks: Mapping[str, nn.Module], count: int) -> Tensor:
        return self._generate(networks["generator"], self.example_batch(count).generator[0].batch)

    def _generate(self, generator: nn.Module, batch: Batch) -> Tensor:
        """Return G's output (N, C, H, W) for a batch."""
        return transport_map(generator, self.config.form, batch.source, batch.labels, batch.s, batch.t)

    def _seen_source(self, batch: Batch) -> Tensor | None:
        """Return G's input (N, C, H, W) if D sees it."""
        return batch.source if self.config.condition_on_source else None

    def _update_discriminator(
        self, learner: Learner, parts: Sequence[DiscriminatorPart], hp: Hyperparameters, output: Tensor | None
    ) -> Tensor:
        values = []
        for index, part in enumerate(parts):
            with learner.accumulate("discriminator", index == len(parts) - 1):
                values.append(self._discriminator_backward(learner, part, hp, output))
        total, *terms = learner.sum(values)
        return torch.stack([*terms, learner.step("discriminator", total, hp)])

    def _discriminator_backward(
        self, learner: Learner, part: DiscriminatorPart, hp: Hyperparameters, output: Tensor | None
    ) -> Tensor:
        """Backpropagate D's loss on a micro-batch; return the loss, its terms, the logit gap and the accuracy.

        D's forward pass is over 2 N + 2 n latents; without penalty noise (an update without lazy penalties) n = 0. In a
        bf16 run with fp32 penalties it is over 2 N latents, and a second one, in float32, over 4 n latents.
        """
        batch, run = part.batch, self.run
        real, source = batch.real, self._seen_source(batch)
        if output is None:
            with torch.no_grad():
                output = self._generate(learner.networks["generator"], batch)  # (N, C, H, W)
        fake = output.detach()
        if part.augment is not None:
            real, fake = part.augment(real), part.augment(fake)
            source = None if source is None else part.augment(source)
        n = 0 if part.noise is None else len(part.noise.real)
        logits = self._logits(learner, batch, real, fake, source, part.noise)
        weighting = batch.weighting if isinstance(batch.weighting, float) else batch.weighting[:n]
        inputs = DLossInputs(logits, run.penalty.epsilon, weighting)
        # Lazy penalties have a larger weight when they are computed, so that the mean over updates is unchanged.
        shares = {"batch": part.share, "penalized": run.penalty.every * part.penalized_share}
        values = [shares[each.over] * each.value(inputs) for each in D_TERMS]
        total = _weighted([each.weight(run, hp) for each in D_TERMS], values)
        total.backward()
        gap = (logits.real - logits.fake).detach()
        gap_and_accuracy = part.share * gap.mean(), part.share * (gap > 0).to(gap.dtype).mean()
        return torch.stack([total.detach(), *(value.detach() for value in values), *gap_and_accuracy])

    def _logits(
        self,
        learner: Learner,
        batch: Batch,
        real: Tensor,
        fake: Tensor,
        source: Tensor | None,
        noise: PenaltyNoise | None,
    ) -> Logits:
        """Return D's logits of real and generated latents (N, C, H, W), and of those that the penalties need."""
        discriminator, count, n = learner.module("discriminator"), len(real), 0
        latents, perturbed = [real, fake], list[Tensor]()
        if noise is not None:
            n, epsilon = len(noise.real), self.run.penalty.epsilon
            perturbed = [perturb(real[:n], noise.real, epsilon), perturb(fake[:n], noise.fake, epsilon)]
        whole, penalized = slice(None), slice(n)
        if n == 0 or self.run.precision == "fp32" or self.run.penalty.precision == "bf16":
            conditions = _conditions(batch, source, [whole, whole, penalized, penalized])
            logits = discriminator(torch.cat([*latents, *perturbed]), *conditions)  # (2 N + 2 n,)
            real_logits, fake_logits, *perturbed_logits = logits.split([count, count, n, n])
            return Logits(real_logits, fake_logits, real_logits[:n], fake_logits[:n], *perturbed_logits)
        logits = discriminator(torch.cat(latents), *_conditions(batch, source, [whole, whole]))  # (2 N,)
        conditions = _conditions(batch, source, [penalized] * 4)
        with in_float32(learner.networks["discriminator"]):
            exact = discriminator(torch.cat([real[:n], fake[:n], *perturbed]), *conditions)  # (4 n,)
        return Logits(*logits.split(count), *exact.split(n))

    def _update_generator(
        self, learner: Learner, parts: Sequence[GeneratorPart], hp: Hyperparameters, output: Tensor | None
    ) -> Tensor:
        all_gradients = self._output_gradients(learner, parts, hp, output)
        scale = self._divisor(learner, all_gradients)
        for index, (part, gradients) in enumerate(zip(parts, all_gradients, strict=True)):
            with learner.accumulate("generator", index == len(parts) - 1):
                generated = gradients.output
                if generated is None:
                    generated = self._generate(learner.module("generator"), part.batch)
                generated.backward(_normalized(gradients, scale) + gradients.others)
        norms = [torch.stack([each.adversarial.square().sum(), each.others.square().sum()]) for each in all_gradients]
        pairs = zip(all_gradients, norms, strict=True)
        values = learner.sum([torch.cat([each.losses, each.squares, norm]) for each, norm in pairs])
        losses, (distance, output_square, real_square, adversarial, others) = values[: 1 + len(G_TERMS)], values[-5:]
        total = _weighted([1.0, *(each.weight(self.run, hp) for each in G_TERMS)], list(losses))
        norm = learner.step("generator", total, hp)
        ratio = (output_square / real_square.clamp(min=1e-12)).sqrt()
        return torch.stack([*losses, distance.sqrt(), ratio, adversarial.sqrt(), others.sqrt(), norm])

    def _output_gradients(
        self, learner: Learner, parts: Sequence[GeneratorPart], hp: Hyperparameters, output: Tensor | None
    ) -> list[OutputGradients]:
        """Return the gradients at G's output for every micro-batch.

        G's graph is kept if there is only one micro-batch; otherwise each needs a second forward pass of G.
        """
        gradients = []
        for part in parts:
            with torch.set_grad_enabled(len(parts) == 1):
                generator = learner.module("generator") if len(parts) == 1 else learner.networks["generator"]
                generated = self._generate(generator, part.batch) if output is None else output
            gradients.append(self._gradients_at(learner.networks["discriminator"], part, hp, generated))
        return gradients

    def _gradients_at(
        self, discriminator: nn.Module, part: GeneratorPart, hp: Hyperparameters, generated: Tensor
    ) -> OutputGradients:
        """Return the gradients of G's loss on a micro-batch at G's output `generated` (N, C, H, W)."""
        batch, augment, share = part.batch, part.augment, part.share
        output = generated.detach().requires_grad_()
        real, d_input, source = batch.real, output, self._seen_source(batch)
        if augment is not None:
            real, d_input = augment(real), augment(output)
            source = None if source is None else augment(source)
        d_leaf = d_input.detach().requires_grad_()
        with torch.no_grad():
            real_logits = discriminator(real, batch.labels, batch.t, source)
        adversarial = share * relativistic(discriminator(d_leaf, batch.labels, batch.t, source), real_logits)
        (gradient,) = torch.autograd.grad(adversarial, d_leaf)
        inputs = GLossInputs(output, batch.source, batch.weighting, part.guidance)
        values = [share * each.value(inputs) for each in G_TERMS]
        total = _weighted([each.weight(self.run, hp) for each in G_TERMS], values)
        (others,) = torch.autograd.grad(total, output)
        squares = (output.detach() - batch.source).square(), output.detach().square(), batch.real.square()
        return OutputGradients(
            adversarial=gradient,
            d_input=d_input,
            leaf=output,
            others=others,
            losses=torch.stack([adversarial.detach(), *(value.detach() for value in values)]),
            squares=torch.stack([share * square.mean() for square in squares]),
            output=generated if generated.requires_grad else None,
        )

    def _divisor(self, learner: Learner, gradients: Sequence[OutputGradients]) -> Tensor | None:
        """Return the divisor of the whole batch's adversarial gradient; None without normalization."""
        settings = self.run.gradient_normalization
        if not settings.enabled:
            return None
        square = learner.sum([each.adversarial.square().sum() for each in gradients])
        elements = self.run.batch_size * gradients[0].adversarial[0].numel()
        return divisor(learner.buffers["mean_square"], square, elements, settings.decay)


def _normalized(gradients: OutputGradients, scale: Tensor | None) -> Tensor:
    """Return the adversarial gradient at G's output (N, C, H, W), divided by `scale`.

    As in the released code, the gradient is normalized at D's input and then backpropagated through the augmentation.
    """
    gradient = gradients.adversarial if scale is None else gradients.adversarial / scale
    if gradients.d_input is gradients.leaf:
        return gradient
    return torch.autograd.grad(gradients.d_input, gradients.leaf, gradient)[0]


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of loss terms."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def _conditions(batch: Batch, source: Tensor | None, rows: Sequence[slice]) -> list[Tensor | None]:
    """Return D's inputs other than latents for some rows of a batch: labels, target times, G's input."""
    inputs = batch.labels, batch.t, source
    return [None if value is None else torch.cat([value[each] for each in rows]) for value in inputs]
