"""Adversarial flow models: a GAN whose generator is tied to the optimal transport map (paper section 3).

An update is one step of D, then one of G; together they cost 14.5 forward passes of G (paper Table 12). Losses are
means over the batch: each micro-batch is weighted by its share, so gradients and figures are sums over micro-batches
and processes. G's adversarial gradient is divided by a number that depends on the whole batch, so the gradients at G's
output are computed for all micro-batches before those of G's weights.

Shapes: N images of a micro-batch, n penalized ones, C, H, W of latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.dit import in_float32
from afm_pipe.models.flow import Flow, transport_map
from afm_pipe.models.generator import Generator
from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator
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
from afm_pipe.objectives.base import Hyperparameters, Learner, Objective, Term
from afm_pipe.objectives.schedules import cosine, num_updates, phase_at, update_at
from afm_pipe.params import Run


class OutputGradients(NamedTuple):
    """The gradients of G's loss at G's output, weighted by the micro-batch's share."""

    adversarial: Tensor  # (N, C, H, W), of the adversarial loss at what D sees, to be normalized
    seen: Tensor  # (N, C, H, W), what D sees of `leaf`: itself, or an augmented view with its graph
    leaf: Tensor  # (N, C, H, W), G's output without G's graph
    others: Tensor  # (N, C, H, W), of transport and guidance, at G's output
    losses: Tensor  # (terms,), unweighted
    squares: Tensor  # (3,), mean squares of G(x_s) - x_s, of G(x_s), of x_t
    output: Tensor | None  # G's output with its graph; None where it is not kept


@register
class AdversarialFlow(Objective):
    """Adversarial flow, for one run and model."""

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
    sampled = "generator"
    adversary = "discriminator"

    def __init__(self, run: Run, config: ModelConfig, classifier: nn.Module | None = None) -> None:
        """Train the model of `config` with the settings of `run`; `classifier` is for phases with guidance."""
        self.run, self.settings, self.config, self.classifier = run, run, config, classifier

    def build_networks(self) -> dict[str, nn.Module]:
        return {"generator": build_generator(self.config), "discriminator": build_discriminator(self.config)}

    def build_buffers(self, device: torch.device) -> dict[str, Tensor]:
        return {"mean_square": torch.zeros((), device=device)}  # of the gradient normalization

    def optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        run = self.run
        return torch.optim.AdamW(
            network.parameters(), lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay, fused=True
        )

    def num_updates(self, num_images: int) -> int:
        return num_updates(self.run, num_images)

    def hyperparameters(self, update: int, num_images: int, clock: float | None = None) -> Hyperparameters:
        phase = phase_at(self.run, update, num_images)
        transport = phase.transport or self.run.transport
        decay_updates = round(transport.decay_epochs * num_images / self.run.batch_size)
        weight = cosine(transport.start, transport.end, update if clock is None else clock, decay_updates)
        lr = phase.lr or self.run.lr
        rates = {"generator": lr, "discriminator": phase.lr_discriminator or lr}
        return Hyperparameters(rates, {"transport": weight}, phase.gradient_clip, phase)

    def decayed(self, update: int, num_images: int, clock: float) -> bool:
        transport = phase_at(self.run, update, num_images).transport or self.run.transport
        over = clock >= update_at(self.run, transport.decay_epochs, num_images)
        return over or transport.start == transport.end

    def batches(
        self,
        latents: Latents,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
    ) -> AdversarialBatches:
        return AdversarialBatches(latents, self.run, self.classifier, device, group, micro_batch)

    def sampler(self, network: nn.Module) -> Flow:
        return Flow(cast(Generator, network), self.config.form, self.config.nfe)

    def describe(self) -> dict[str, Any]:
        return self.config.model_dump()

    def progress(self, row: Mapping[str, float]) -> str:
        return f"logit gap {row['logit_gap']:.2f}  transport {row['transport_rms']:.2f}"

    def update(self, learner: Learner, batch: Draw, hyperparameters: Hyperparameters) -> Tensor:
        made = batch.generator
        # One forward pass of G for both steps needs its graph kept meanwhile: only where there is one micro-batch.
        reused = self.run.reuse_forward and len(made) == 1
        output = self._generate(learner.module("generator"), made[0].batch) if reused else None
        for parts in batch.discriminator:
            of_d = self._update_discriminator(learner, parts, hyperparameters, output)
        discriminator = learner.networks["discriminator"].requires_grad_(False)
        of_g = self._update_generator(learner, made, hyperparameters, output)
        discriminator.requires_grad_(True)
        return torch.cat([of_d, of_g])

    def example_batch(self, count: int, penalized: int | None = None) -> Draw:
        if penalized is None:
            penalized = max(round(count * self.run.penalty.batch_fraction), 1)
        latents = torch.empty(count, *self.config.latent_shape)
        times = (None, None) if self.config.nfe == 1 else (torch.empty(count), torch.empty(count))
        batch = Batch(latents, torch.empty_like(latents), torch.zeros(count, dtype=torch.int64), *times)
        noise = PenaltyNoise(torch.empty_like(latents[:penalized]), torch.empty_like(latents[:penalized]))
        part = DiscriminatorPart(batch, noise if penalized else None)
        return Draw([[part]] * self.run.discriminator_updates, [GeneratorPart(batch)])

    def example_forward(self, networks: Mapping[str, nn.Module], count: int) -> Tensor:
        return self._generate(networks["generator"], self.example_batch(count).generator[0].batch)

    def _generate(self, generator: nn.Module, batch: Batch) -> Tensor:
        """Return G's output (N, C, H, W) on a batch."""
        return transport_map(generator, self.config.form, batch.source, batch.labels, batch.s, batch.t)

    def _update_discriminator(
        self, learner: Learner, parts: Sequence[DiscriminatorPart], now: Hyperparameters, output: Tensor | None
    ) -> Tensor:
        figures = []
        for index, part in enumerate(parts):
            with learner.accumulate("discriminator", index == len(parts) - 1):
                figures.append(self._discriminator_backward(learner, part, now, output))
        total, *others = learner.sum(figures)
        return torch.stack([*others, learner.step("discriminator", total, now)])

    def _discriminator_backward(
        self, learner: Learner, part: DiscriminatorPart, now: Hyperparameters, output: Tensor | None
    ) -> Tensor:
        """Backpropagate D's loss through one forward pass of D over 2 N + 2 n latents; return its figures.

        Without penalty noise the update is one that lazy penalties leave out: n = 0. Where the run is in bf16 and its
        penalties are not, a second forward pass in float32 is over 4 n latents.
        """
        batch, run = part.batch, self.run
        real, source = batch.real, batch.source
        if output is None:
            with torch.no_grad():
                output = self._generate(learner.networks["generator"], batch)  # (N, C, H, W)
        fake = output.detach()
        if part.view is not None:
            real, fake, source = part.view(real), part.view(fake), part.view(source)
        n = 0 if part.noise is None else len(part.noise.real)
        logits = self._judge(learner, batch, real, fake, source, part.noise)
        weighting = batch.weighting if isinstance(batch.weighting, float) else batch.weighting[:n]
        seen = DLossInputs(logits, run.penalty.epsilon, weighting)
        # Lazy penalties weigh more where they are computed, so that their mean over updates is the penalty's.
        shares = {"batch": part.share, "penalized": run.penalty.every * part.penalized_share}
        values = [shares[each.over] * each.value(seen) for each in D_TERMS]
        total = _weighted([each.weight(run, now) for each in D_TERMS], values)
        total.backward()
        gap = (logits.real - logits.fake).detach()
        beside = part.share * gap.mean(), part.share * (gap > 0).to(gap.dtype).mean()
        return torch.stack([total.detach(), *(value.detach() for value in values), *beside])

    def _judge(
        self, learner: Learner, batch: Batch, real: Tensor, fake: Tensor, source: Tensor, noise: PenaltyNoise | None
    ) -> Logits:
        """Return D's logits of real and generated latents (N, C, H, W), and of those the penalties need."""
        judge, count, n = learner.module("discriminator"), len(real), 0
        ends, steps = [real, fake], list[Tensor]()
        if noise is not None:
            n, epsilon = len(noise.real), self.run.penalty.epsilon
            steps = [perturb(real[:n], noise.real, epsilon), perturb(fake[:n], noise.fake, epsilon)]
        whole, penalized = slice(None), slice(n)
        if n == 0 or self.run.precision == "fp32" or self.run.penalty.precision == "bf16":
            rows = [whole, whole, penalized, penalized]
            logits = judge(torch.cat([*ends, *steps]), *_beside(batch, source, rows))  # (2 N + 2 n,)
            of_real, of_fake, *of_steps = logits.split([count, count, n, n])
            return Logits(of_real, of_fake, of_real[:n], of_fake[:n], *of_steps)
        logits = judge(torch.cat(ends), *_beside(batch, source, [whole, whole]))  # (2 N,)
        starts = [end[:n] for end in ends]
        with in_float32(learner.networks["discriminator"]):
            exact = judge(torch.cat([*starts, *steps]), *_beside(batch, source, [penalized] * 4))  # (4 n,)
        return Logits(*logits.split(count), *exact.split(n))

    def _update_generator(
        self, learner: Learner, parts: Sequence[GeneratorPart], now: Hyperparameters, output: Tensor | None
    ) -> Tensor:
        at_output = self._output_gradients(learner, parts, now, output)
        scale = self._divisor(learner, at_output)
        for index, (part, gradients) in enumerate(zip(parts, at_output, strict=True)):
            with learner.accumulate("generator", index == len(parts) - 1):
                made = gradients.output
                if made is None:
                    made = self._generate(learner.module("generator"), part.batch)
                made.backward(_at_output(gradients, scale) + gradients.others)
        norms = [torch.stack([each.adversarial.square().sum(), each.others.square().sum()]) for each in at_output]
        pairs = zip(at_output, norms, strict=True)
        figures = learner.sum([torch.cat([each.losses, each.squares, norm]) for each, norm in pairs])
        losses, (distance, made_square, real_square, push, pull) = figures[: 1 + len(G_TERMS)], figures[-5:]
        total = _weighted([1.0, *(each.weight(self.run, now) for each in G_TERMS)], list(losses))
        norm = learner.step("generator", total, now)
        ratio = (made_square / real_square.clamp(min=1e-12)).sqrt()
        return torch.stack([*losses, distance.sqrt(), ratio, push.sqrt(), pull.sqrt(), norm])

    def _output_gradients(
        self, learner: Learner, parts: Sequence[GeneratorPart], now: Hyperparameters, output: Tensor | None
    ) -> list[OutputGradients]:
        """Return the gradients at G's output for every micro-batch.

        G's graph is kept for a single micro-batch; several of them pass through G again.
        """
        found = []
        for part in parts:
            with torch.set_grad_enabled(len(parts) == 1):
                single = learner.module("generator") if len(parts) == 1 else learner.networks["generator"]
                made = self._generate(single, part.batch) if output is None else output
            found.append(self._gradients_at(learner.networks["discriminator"], part, now, made))
        return found

    def _gradients_at(
        self, discriminator: nn.Module, part: GeneratorPart, now: Hyperparameters, made: Tensor
    ) -> OutputGradients:
        """Return the gradients of G's loss at G's output `made` (N, C, H, W), on a micro-batch."""
        batch, view, share = part.batch, part.view, part.share
        output = made.detach().requires_grad_()
        real, seen, source = batch.real, output, batch.source
        if view is not None:
            real, seen, source = view(real), view(output), view(source)
        judged = seen.detach().requires_grad_()
        with torch.no_grad():
            real_logits = discriminator(real, batch.labels, batch.t, source)
        adversarial = share * relativistic(discriminator(judged, batch.labels, batch.t, source), real_logits)
        (gradient,) = torch.autograd.grad(adversarial, judged)
        generated = GLossInputs(output, batch.source, batch.weighting, part.guide)
        values = [share * each.value(generated) for each in G_TERMS]
        total = _weighted([each.weight(self.run, now) for each in G_TERMS], values)
        (others,) = torch.autograd.grad(total, output)
        squares = (output.detach() - batch.source).square(), output.detach().square(), batch.real.square()
        return OutputGradients(
            adversarial=gradient,
            seen=seen,
            leaf=output,
            others=others,
            losses=torch.stack([adversarial.detach(), *(value.detach() for value in values)]),
            squares=torch.stack([share * square.mean() for square in squares]),
            output=made if made.requires_grad else None,
        )

    def _divisor(self, learner: Learner, at_output: Sequence[OutputGradients]) -> Tensor | None:
        """Return the divisor of the whole batch's adversarial gradient; None without normalization."""
        settings = self.run.gradient_normalization
        if not settings.enabled:
            return None
        square = learner.sum([each.adversarial.square().sum() for each in at_output])
        elements = self.run.batch_size * at_output[0].adversarial[0].numel()
        return divisor(learner.buffers["mean_square"], square, elements, settings.decay)


def _at_output(gradients: OutputGradients, scale: Tensor | None) -> Tensor:
    """Return the adversarial gradient at G's output (N, C, H, W), normalized by `scale` where D sees it.

    The release normalizes there, too: what an augmentation erases counts in the norm, and the normalized gradient goes
    back through the augmentation.
    """
    gradient = gradients.adversarial if scale is None else gradients.adversarial / scale
    if gradients.seen is gradients.leaf:
        return gradient
    return torch.autograd.grad(gradients.seen, gradients.leaf, gradient)[0]


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of loss terms."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def _beside(batch: Batch, source: Tensor, rows: Sequence[slice]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return what D is given beside latents, of some rows of a batch: labels, target times, G's input."""
    labels, source = (torch.cat([value[each] for each in rows]) for value in (batch.labels, source))
    times = None if batch.t is None else torch.cat([batch.t[each] for each in rows])
    return labels, times, source
