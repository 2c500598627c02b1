"""Adversarial flow models: a GAN whose generator is tied to the optimal transport map (paper section 3).

An update is one step of D, then one of G; together they cost 14.5 forward passes of G (paper Table 12). Losses are
means over the batch, whose micro-batches weigh by their share, so gradients and figures are sums over micro-batches and
processes. G's adversarial gradient is divided by a number that depends on the whole batch: the gradients at G's output
of all micro-batches come first, then those of G's weights.

Shapes: N images of a micro-batch, n penalized ones, C, H, W of latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.flow import Flow, transport_map
from afm_pipe.models.generator import Generator
from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator
from afm_pipe.objectives import register
from afm_pipe.objectives.adversarial_flow.batches import AdversarialBatches, Batch, Part, PenaltyNoise, Share
from afm_pipe.objectives.adversarial_flow.losses import Logits, moved, relativistic
from afm_pipe.objectives.adversarial_flow.normalizer import divisor
from afm_pipe.objectives.adversarial_flow.terms import D_TERMS, G_ADVERSARIAL, G_TERMS, Generated, Judged
from afm_pipe.objectives.base import Hyperparameters, Learner, Objective, Term
from afm_pipe.objectives.schedules import cosine, num_updates, phase_at, update_at
from afm_pipe.params import Run


class OutputGradients(NamedTuple):
    """The gradients of G's loss at G's output, weighted by the micro-batch's share."""

    adversarial: Tensor  # (N, C, H, W), to be normalized
    others: Tensor  # (N, C, H, W), of transport and guidance
    losses: Tensor  # (terms,), unweighted
    squares: Tensor  # (3,), mean squares of G(x_s) - x_s, of G(x_s), of x_t
    output: Tensor | None  # G's output with its graph; None where it is not kept


@register
class AdversarialFlow(Objective):
    """One run of adversarial flow, on one model."""

    name = "adversarial_flow"
    terms = (
        *(each.term for each in D_TERMS),
        Term("logit_gap", "Logit gap", "Mean D(x) - D(G(z))"),
        Term("d_accuracy", "Discriminator accuracy", "Share of pairs with D(x) > D(G(z))", role="d_accuracy"),
        Term("d_grad_norm", "Discriminator's gradient norm", "Log scale", log=True),
        G_ADVERSARIAL,
        *(each.term for each in G_TERMS),
        Term("transport_rms", "Transport distance", "rms(G(z) - z)", role="transport_distance"),
        Term(
            "output_scale",
            "Size of samples",
            "rms(G(z)) over rms(x): far above 1, the run diverges",
            role="output_scale",
        ),
        Term("g_adv_output_grad_norm", "Adversarial gradient at G's output", "Before normalization", log=True),
        Term("g_transport_output_grad_norm", "Transport gradient at G's output", "With guidance's, if any", log=True),
        Term("g_grad_norm", "Generator's gradient norm", "Log scale", log=True),
    )
    scheduled = (Term("transport", "Transport weight", "lambda_ot"),)
    sampled = "generator"
    adversary = "discriminator"

    def __init__(self, run: Run, config: ModelConfig, classifier: nn.Module | None = None) -> None:
        """Train `config`'s model as `run` says; `classifier` guides phases with guidance."""
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

    def update(self, learner: Learner, batch: Sequence[Part], hyperparameters: Hyperparameters) -> Tensor:
        # One forward pass of G for both steps needs its graph kept meanwhile: only where there is one micro-batch.
        output = self._generate(learner.module("generator"), batch[0]) if self._reuses(batch) else None
        of_d = self._update_discriminator(learner, batch, hyperparameters, output)
        discriminator = learner.networks["discriminator"].requires_grad_(False)
        of_g = self._update_generator(learner, batch, hyperparameters, output)
        discriminator.requires_grad_(True)
        return torch.cat([of_d, of_g])

    def example_batch(self, count: int, penalized: int | None = None) -> Part:
        if penalized is None:
            penalized = max(round(count * self.run.penalty.batch_fraction), 1)
        latents = torch.empty(count, *self.config.latent_shape)
        times = (None, None) if self.config.nfe == 1 else (torch.empty(count), torch.empty(count))
        batch = Batch(latents, torch.empty_like(latents), torch.zeros(count, dtype=torch.int64), *times)
        noise = PenaltyNoise(torch.empty_like(latents[:penalized]), torch.empty_like(latents[:penalized]))
        return Part(batch, batch, noise, None, None, None, Share())

    def example_forward(self, networks: Mapping[str, nn.Module], count: int) -> Tensor:
        return self._generate(networks["generator"], self.example_batch(count))

    def _reuses(self, batch: Sequence[Part]) -> bool:
        return self.run.reuse_forward and len(batch) == 1

    def _generate(self, generator: nn.Module, part: Part) -> Tensor:
        """Return G's output (N, C, H, W) on G's batch."""
        source, labels, s, t = part.g_batch.source, part.g_batch.labels, part.g_batch.s, part.g_batch.t
        return transport_map(generator, self.config.form, source, labels, s, t)

    def _update_discriminator(
        self, learner: Learner, batch: Sequence[Part], now: Hyperparameters, output: Tensor | None
    ) -> Tensor:
        figures = []
        for index, part in enumerate(batch):
            with learner.accumulate("discriminator", index == len(batch) - 1):
                figures.append(self._discriminator_backward(learner, part, now, output))
        total, *others = learner.sum(figures)
        return torch.stack([*others, learner.step("discriminator", total, now)])

    def _discriminator_backward(
        self, learner: Learner, part: Part, now: Hyperparameters, output: Tensor | None
    ) -> Tensor:
        """Add the gradients of D's loss to D's parameters, by one forward pass of D over 2 N + 2 n latents.

        Without penalty noise the update is one that lazy penalties leave out: n = 0.
        """
        batch, share, run = part.d_batch, part.share, self.run
        real, labels, t, source = batch.real, batch.labels, batch.t, batch.source
        if output is None:
            with torch.no_grad():
                generator = learner.networks["generator"]
                output = transport_map(generator, self.config.form, source, labels, batch.s, t)  # (N, C, H, W)
        fake = output.detach()
        if part.d_view is not None:
            real, fake, source = part.d_view(real), part.d_view(fake), part.d_view(source)
        epsilon, noise = run.penalty.epsilon, part.noise
        n = 0 if noise is None else len(noise.real)
        everything = [real, fake]
        if noise is not None:
            everything += [moved(real[:n], noise.real, epsilon), moved(fake[:n], noise.fake, epsilon)]
        judge = learner.module("discriminator")
        times = None if t is None else _four(t, n)
        logits = judge(torch.cat(everything), _four(labels, n), times, _four(source, n))  # (2 N + 2 n,)
        weighting = batch.weighting if isinstance(batch.weighting, float) else batch.weighting[:n]
        seen = Judged(Logits(*logits.split([len(real), len(fake), n, n])), epsilon, weighting)
        # Lazy penalties weigh more where they are computed, so that their mean over updates is the penalty's.
        shares = {"batch": share.batch, "penalized": run.penalty.every * share.penalized}
        values = [shares[each.over] * each.value(seen) for each in D_TERMS]
        total = _weighted([each.weight(run, now) for each in D_TERMS], values)
        total.backward()
        gap = (seen.logits.real - seen.logits.fake).detach()
        beside = share.batch * gap.mean(), share.batch * (gap > 0).to(gap.dtype).mean()
        return torch.stack([total.detach(), *(value.detach() for value in values), *beside])

    def _update_generator(
        self, learner: Learner, batch: Sequence[Part], now: Hyperparameters, output: Tensor | None
    ) -> Tensor:
        at_output = self._output_gradients(learner, batch, now, output)
        scale = self._divisor(learner, at_output)
        for index, (part, gradients) in enumerate(zip(batch, at_output, strict=True)):
            with learner.accumulate("generator", index == len(batch) - 1):
                adversarial = gradients.adversarial if scale is None else gradients.adversarial / scale
                made = gradients.output
                if made is None:
                    made = self._generate(learner.module("generator"), part)
                made.backward(adversarial + gradients.others)
        norms = [torch.stack([each.adversarial.square().sum(), each.others.square().sum()]) for each in at_output]
        parts = zip(at_output, norms, strict=True)
        figures = learner.sum([torch.cat([each.losses, each.squares, norm]) for each, norm in parts])
        losses, (distance, made_square, real_square, push, pull) = figures[: 1 + len(G_TERMS)], figures[-5:]
        total = _weighted([1.0, *(each.weight(self.run, now) for each in G_TERMS)], list(losses))
        norm = learner.step("generator", total, now)
        ratio = (made_square / real_square.clamp(min=1e-12)).sqrt()
        return torch.stack([*losses, distance.sqrt(), ratio, push.sqrt(), pull.sqrt(), norm])

    def _output_gradients(
        self, learner: Learner, batch: Sequence[Part], now: Hyperparameters, output: Tensor | None
    ) -> list[OutputGradients]:
        """Return the gradients at G's output of every micro-batch.

        G's graph is kept for a single micro-batch; several pass through G again.
        """
        found = []
        for part in batch:
            with torch.set_grad_enabled(len(batch) == 1):
                single = learner.module("generator") if len(batch) == 1 else learner.networks["generator"]
                made = self._generate(single, part) if output is None else output
            found.append(self._gradients_at(learner.networks["discriminator"], part, now, made))
        return found

    def _gradients_at(
        self, discriminator: nn.Module, part: Part, now: Hyperparameters, made: Tensor
    ) -> OutputGradients:
        """Return the gradients of G's loss at G's output `made` (N, C, H, W), on a micro-batch."""
        batch, view, share = part.g_batch, part.g_view, part.share.batch
        output = made.detach().requires_grad_()
        real, seen, source = batch.real, output, batch.source
        if view is not None:
            real, seen, source = view(real), view(output), view(source)
        with torch.no_grad():
            real_logits = discriminator(real, batch.labels, batch.t, source)
        adversarial = share * relativistic(discriminator(seen, batch.labels, batch.t, source), real_logits)
        (gradient,) = torch.autograd.grad(adversarial, output)
        generated = Generated(output, batch.source, batch.weighting, part.guide)
        values = [share * each.value(generated) for each in G_TERMS]
        total = _weighted([each.weight(self.run, now) for each in G_TERMS], values)
        (others,) = torch.autograd.grad(total, output)
        squares = (output.detach() - batch.source).square(), output.detach().square(), batch.real.square()
        return OutputGradients(
            adversarial=gradient,
            others=others,
            losses=torch.stack([adversarial.detach(), *(value.detach() for value in values)]),
            squares=torch.stack([share * square.mean() for square in squares]),
            output=made if made.requires_grad else None,
        )

    def _divisor(self, learner: Learner, at_output: Sequence[OutputGradients]) -> Tensor | None:
        """Return what the adversarial gradient of the whole batch is divided by, if it is normalized."""
        settings = self.run.gradient_normalization
        if not settings.enabled:
            return None
        square = learner.sum([each.adversarial.square().sum() for each in at_output])
        elements = self.run.batch_size * at_output[0].adversarial[0].numel()
        return divisor(learner.buffers["mean_square"], square, elements, settings.decay)


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of loss terms."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def _four(values: Tensor, n: int) -> Tensor:
    """Repeat what belongs to a batch (N,) for its four parts in D's forward: real, fake, and n of each moved."""
    return torch.cat([values, values, values[:n], values[:n]])
