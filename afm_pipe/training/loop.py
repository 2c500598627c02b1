"""The training loop: alternate D and G updates, log, checkpoint; killed at any moment, the same call goes on."""

import math
import time
from collections.abc import Collection, Generator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from afm_pipe.console import Tick
from afm_pipe.data.latents import Latents
from afm_pipe.errors import NotFiniteError
from afm_pipe.files import atomic_path
from afm_pipe.models.checkpoint_format import ModelConfig, save_tensors
from afm_pipe.models.flow import Flow
from afm_pipe.params import Run
from afm_pipe.training.batches import Batches
from afm_pipe.training.checkpoints import load_latest, save_checkpoint
from afm_pipe.training.curves import CLOCK, MEANS, append_curve, write_curves
from afm_pipe.training.interventions import intervene
from afm_pipe.training.schedules import ema_decay_at, num_updates, setting_at
from afm_pipe.training.state import Start, TrainingState
from afm_pipe.training.step import DiscriminatorStep, GeneratorStep, discriminator_step, generator_step

ROWS = 1000  # at the most, in the curves of a run; rows are at least 10 updates apart


class Trained(NamedTuple):
    """A finished training."""

    state: TrainingState
    notes: list[str]  # what a person should know of how it went


def train(
    run: Run,
    config: ModelConfig,
    latents: Latents,
    work_dir: Path,
    fingerprint: str,
    device: torch.device,
    checkpoint_seconds: float,
    start: Start | None = None,
    classifier: nn.Module | None = None,
    keep_at: Collection[int] = (),
) -> Generator[Tick, None, Trained]:
    """Train a run to its end, from its newest checkpoint under `work_dir`, else from `start`, else from nothing.

    `classifier` is needed by phases with guidance. After the updates in `keep_at` G's moving average is kept, as
    `kept(work_dir, update)`.
    Raises NotFiniteError on a non-finite loss (before it reaches the weights) and on a checkpoint of other params.
    """
    total = num_updates(run, latents.num_images)
    row_every = max(10, total // ROWS)
    state = TrainingState.fresh(config, run, device)
    if start is not None:
        state.begin_from(start)
    notes = load_latest(work_dir / "checkpoints", state, fingerprint)
    write_curves(work_dir / "curves.csv", state.rows)
    batches = Batches(latents, run, device)
    flow = Flow(state.generator, config.form, config.nfe)
    normalizer = state.normalizer if run.gradient_normalization.enabled else None
    saved = lapped = time.monotonic()

    yield Tick(state.update, total, "updates")
    while state.update < total:
        waited = time.monotonic()
        seen = state.update * run.batch_size
        setting = setting_at(run, state.update, latents.num_images)
        phase = setting.phase
        g_batch = batches.batch("generator", seen)
        d_batch = g_batch if run.reuse_forward else batches.batch("discriminator", seen)
        noise = batches.penalty_noise(seen)
        d_view, g_view = (batches.view(phase.augment, stream, seen) for stream in ("discriminator", "generator"))
        guide = batches.guide(phase.guidance, classifier, g_batch, seen)
        state.seconds["data_wait"] += time.monotonic() - waited

        for event in intervene(run, state, latents.num_images, work_dir / "discriminators"):
            notes.append(f"update {state.update}: {event}")
        fake = flow(g_batch.source, g_batch.labels, g_batch.s, g_batch.t) if run.reuse_forward else None
        d_step = discriminator_step(flow, state.discriminator, d_batch, noise, run, d_view, fake)
        d_norm = _apply(state, "discriminator", d_step.total, setting.lr_discriminator, phase.gradient_clip)
        state.discriminator.requires_grad_(False)
        g_step = generator_step(flow, state.discriminator, g_batch, setting.transport, normalizer, g_view, guide, fake)
        state.discriminator.requires_grad_(True)
        g_norm = _apply(state, "generator", g_step.total, setting.lr, phase.gradient_clip)
        _update_ema(state, ema_decay_at(run.ema, state.update))
        state.sums += _figures(d_step, d_norm, g_step, g_norm)
        state.update += 1
        if state.update in keep_at:
            with atomic_path(kept(work_dir, state.update)) as aside:
                save_tensors(aside, state.ema.state_dict())

        if state.update % row_every and state.update < total:
            continue
        since = state.update - (state.rows[-1]["update"] if state.rows else start.update if start else 0)
        means = dict(zip(MEANS, (state.sums / since).tolist(), strict=True))
        seen = state.update * run.batch_size
        clock = (state.update, seen, seen / latents.num_images, setting.lr, setting.transport)
        state.rows.append(dict(zip(CLOCK, clock, strict=True)) | means)
        append_curve(work_dir / "curves.csv", state.rows[-1])
        state.sums.zero_()
        now = time.monotonic()
        state.seconds["training"] += now - lapped
        lapped = now
        if now - saved >= checkpoint_seconds or state.update == total:
            save_checkpoint(work_dir / "checkpoints", state, fingerprint)
            saved = time.monotonic()
            state.seconds["saving"] += saved - now
        yield Tick(state.update, total, "updates", f"gap {means['logit_gap']:.2f}  move {means['move_rms']:.2f}")
    return Trained(state, notes)


def kept(work_dir: Path, update: int) -> Path:
    """Where the moving average after an update is kept, if it is."""
    return work_dir / "kept" / f"update-{update:09d}.safetensors"


def _apply(state: TrainingState, which: str, total: Tensor, lr: float, clip: float | None) -> Tensor:
    """Step one optimizer with the gradients at hand and clear them; return the gradients' norm before any clipping."""
    if not math.isfinite(total.item()):
        raise NotFiniteError(
            f"Found a {which} loss of {total.item()} at update {state.update}, expected a finite one: the weights "
            "before it are kept. Lower lr, or raise the weight of the transport or the penalty.",
            state.update,
        )
    module: nn.Module = getattr(state, which)
    optimizer: torch.optim.AdamW = getattr(state, f"optimizer_{which}")
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None], foreach=True)
    if clip is not None:
        nn.utils.clip_grads_with_norm_(module.parameters(), clip, norm, foreach=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def _update_ema(state: TrainingState, decay: float) -> None:
    averages: list[Tensor] = list(state.ema.parameters())
    weights: list[Tensor] = list(state.generator.parameters())
    torch._foreach_lerp_(averages, weights, 1 - decay)


def _figures(d_step: DiscriminatorStep, d_norm: Tensor, g_step: GeneratorStep, g_norm: Tensor) -> Tensor:
    gap = (d_step.logits.real - d_step.logits.fake).detach()
    of_d = (*d_step.terms, gap.mean(), (gap > 0).float().mean(), d_norm)
    return torch.stack([*of_d, *g_step.terms, g_step.move_rms, g_norm]).float()  # in the order of MEANS
