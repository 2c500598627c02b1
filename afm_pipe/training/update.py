"""One update of D and one of G on a whole batch: on as many ranks as there are, in as many parts as each takes.

Losses are means over the batch, whose parts weigh by their share, so gradients and figures are summed over parts and
ranks. G's adversarial gradient is divided by a number that depends on the whole batch: all parts' gradients at G's
output come first, then those of G's weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.flow import Flow
from afm_pipe.objectives.adversarial_flow.batches import Part
from afm_pipe.objectives.adversarial_flow.losses import GeneratorTerms
from afm_pipe.objectives.adversarial_flow.step import (
    OutputGradients,
    discriminator_step,
    generator_total,
    output_gradients,
)
from afm_pipe.params import Run
from afm_pipe.runtime.errors import NotFiniteError
from afm_pipe.training.gradients import SharedGradients
from afm_pipe.training.schedules import Setting, ema_decay_at
from afm_pipe.training.sharding import full_tensor, local
from afm_pipe.training.state import TrainingState

NEVER = 2**31 - 1


class Updates:
    """Updates a state from batches, the same on every rank."""

    def __init__(self, state: TrainingState, flow: Flow, run: Run, ranks: ProcessGroup) -> None:
        self.state, self.flow, self.run, self.ranks = state, flow, run, ranks
        # Sharded networks sum their gradients themselves, in every backward pass: whole ones would not fit.
        adding = ranks if state.shares.world_size == 1 else SINGLE_PROCESS
        self.d_gradients = SharedGradients(state.discriminator, adding)
        self.g_gradients = SharedGradients(state.generator, adding)
        device = next(state.generator.parameters()).device
        # The update that first had a loss which is not finite, on the device; from then on no optimizer steps.
        self._diverged_at = torch.full((), NEVER, device=device)
        # Elsewhere than on a CPU a look at a number makes the host wait for the device: once a row is enough.
        self._looks_at_once = device.type == "cpu"
        self.normalizer = state.normalizer if run.gradient_normalization.enabled else None

    def update(self, parts: Sequence[Part], setting: Setting) -> Tensor:
        """Update D, then G, then G's moving average; return the figures of the whole batch, in the order of MEANS.

        Raises NotFiniteError on a loss that is not finite, before it reaches the weights.
        """
        discriminator = self.state.discriminator
        # One forward pass of G for both updates needs its graph kept meanwhile: only where the batch is in one part.
        fake = self._forward(parts[0]) if self.run.reuse_forward and len(parts) == 1 else None
        of_d = self._update_discriminator(parts, setting, fake)
        discriminator.requires_grad_(False)
        of_g = self._update_generator(parts, setting, fake)
        discriminator.requires_grad_(True)
        self._update_ema()
        return torch.cat([of_d, of_g])

    def _update_discriminator(self, parts: Sequence[Part], setting: Setting, fake: Tensor | None) -> Tensor:
        figures, discriminator = [], self.state.discriminator
        for index, part in enumerate(parts):
            with self.d_gradients.last_part(index == len(parts) - 1):
                step = discriminator_step(
                    self.flow, discriminator, part.d_batch, part.noise, self.run, part.d_view, fake, part.share
                )
            gap = (step.logits.real - step.logits.fake).detach()
            beside = part.share.batch * gap.mean(), part.share.batch * (gap > 0).to(gap.dtype).mean()
            figures.append(torch.stack([step.total, *step.terms, *beside]))
        total, *others = self._summed(figures)
        norm = self._apply("discriminator", total, setting.lr_discriminator, setting.phase.gradient_clip)
        return torch.stack([*others, norm])

    def _update_generator(self, parts: Sequence[Part], setting: Setting, fake: Tensor | None) -> Tensor:
        at_output = self._output_gradients(parts, setting, fake)
        divisor = self._divisor(at_output)
        for index, (part, gradients) in enumerate(zip(parts, at_output, strict=True)):
            with self.g_gradients.last_part(index == len(parts) - 1):
                adversarial = gradients.adversarial if divisor is None else gradients.adversarial / divisor
                output = self._forward(part) if gradients.fake is None else gradients.fake
                output.backward(adversarial + gradients.others)
        *terms, move, output, real, push, pull = self._summed([_figures(each) for each in at_output])
        total = generator_total(GeneratorTerms(*terms), setting.transport)
        norm = self._apply("generator", total, setting.lr, setting.phase.gradient_clip)
        scale = (output / real.clamp(min=1e-12)).sqrt()
        return torch.stack([*terms, move.sqrt(), scale, push.sqrt(), pull.sqrt(), norm])

    def _output_gradients(self, parts: Sequence[Part], setting: Setting, fake: Tensor | None) -> list[OutputGradients]:
        """Return every part's gradients at G's output. G's graph is kept for one part; several pass through G again."""
        found = []
        for part in parts:
            with torch.set_grad_enabled(len(parts) == 1):
                output = self._forward(part) if fake is None else fake
            found.append(
                output_gradients(
                    self.state.discriminator,
                    part.g_batch,
                    setting.transport,
                    output,
                    part.g_view,
                    part.guide,
                    part.share,
                )
            )
        return found

    def _forward(self, part: Part) -> Tensor:  # (N, C, H, W)
        batch = part.g_batch
        return self.flow(batch.source, batch.labels, batch.s, batch.t)

    def _divisor(self, at_output: Sequence[OutputGradients]) -> Tensor | None:
        """Return what the adversarial gradient of the whole batch is divided by, if it is normalised."""
        if self.normalizer is None:
            return None
        square = self._summed([each.adversarial.square().sum() for each in at_output])
        return self.normalizer.divisor(square, self.run.batch_size * at_output[0].adversarial[0].numel())

    def _summed(self, figures: Sequence[Tensor]) -> Tensor:
        """Return figures of the whole batch from those of this rank's parts."""
        return self.ranks.all_reduce(figures[0] if len(figures) == 1 else torch.stack([*figures]).sum(0))

    def _apply(self, which: str, total: Tensor, lr: float, clip: float | None) -> Tensor:
        """Step one optimizer with the gradients at hand and clear them; return their norm before any clipping."""
        module: nn.Module = getattr(self.state, which)
        optimizer: torch.optim.AdamW = getattr(self.state, f"optimizer_{which}")
        if self._looks_at_once:
            if not math.isfinite(total.item()):
                raise _not_finite(f"a {which} loss of {total.item()}", self.state.update)
        else:
            now = torch.where(total.isfinite(), NEVER, self.state.update)
            torch.minimum(self._diverged_at, now, out=self._diverged_at)
            optimizer.found_inf = (self._diverged_at < NEVER).float()  # type: ignore[attr-defined]  # AdamW asks for it
        norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None], foreach=True)
        if clip is not None:
            nn.utils.clip_grads_with_norm_(module.parameters(), clip, norm, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        (self.d_gradients if which == "discriminator" else self.g_gradients).clear()
        return full_tensor(norm)

    def require_finite(self) -> None:
        """Raise NotFiniteError if any loss so far was not finite; the weights are those before it."""
        update = int(self._diverged_at)
        if update < NEVER:
            raise _not_finite("a loss that is not finite", update)

    def abandon(self) -> None:
        """Leave no trace of an update that was broken off but in the weights."""
        self._diverged_at.fill_(NEVER)
        self.state.discriminator.requires_grad_(True)
        self.d_gradients.clear()
        self.g_gradients.clear()

    @torch.no_grad()
    def _update_ema(self) -> None:
        averages: list[Tensor] = [local(average) for average in self.state.ema.parameters()]
        weights = [local(weight).to(averages[0].device) for weight in self.state.generator.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - ema_decay_at(self.run.ema, self.state.update))


def _not_finite(found: str, update: int) -> NotFiniteError:
    return NotFiniteError(
        f"Found {found} at update {update}, expected a finite one: the weights before it are kept. Lower lr, or raise "
        "the weight of the transport or the penalty.",
        update,
    )


def _figures(of: OutputGradients) -> Tensor:
    """Return the figures of a part that add up over the parts of a batch."""
    squares = of.square_move, of.square_output, of.square_real
    pushes = of.adversarial.square().sum(), of.others.square().sum()
    return torch.stack([*of.terms, *squares, *pushes])
