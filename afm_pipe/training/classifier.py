"""Training of the classifier that guides: cross entropy on latents at random noise levels (paper section 3).

Killed at any moment, the same call goes on. Where this differs from the paper: the affine augmentation changes latents,
with reflection at the border, since images are encoded once and for all; the paper changes images and encodes them.
"""

import copy
import signal
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import load_exactly
from afm_pipe.objectives.adversarial_flow.augment import affine_view
from afm_pipe.objectives.adversarial_flow.batches import num_micro_batches, require_images
from afm_pipe.objectives.adversarial_flow.losses import interpolate
from afm_pipe.params import Classifier
from afm_pipe.params.sizes import SIZES
from afm_pipe.runtime.progress import Progress
from afm_pipe.runtime.signals import Stopped, shutdown_requested
from afm_pipe.training.checkpoints import RetentionPolicy, Writer, load_latest
from afm_pipe.training.curves import Row
from afm_pipe.training.gradients import SharedGradients
from afm_pipe.training.schedules import ema_decay_at
from afm_pipe.training.sharding import unfilled
from afm_pipe.training.state import CLOCKS, load_optimizer, optimizer_tensors

UPDATES_PER_ROW = 50
LEVELS = (0.0, 0.1, 0.25, 0.5)  # times at which accuracy is measured
MEASURED = 2000  # latents


class ClassifierState:
    """The classifier, its moving average, its optimizer and its clock."""

    def __init__(self, model: LatentClassifier, params: Classifier) -> None:
        self.model, self.ema = model, copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=params.lr, betas=params.betas, weight_decay=params.weight_decay, fused=True
        )
        self.update = 0
        self.seconds = dict.fromkeys(CLOCKS, 0.0)
        self.rows: list[Row] = []
        self.extra: dict[str, Any] = {}
        self.losses = torch.zeros((), device=next(model.parameters()).device)  # since the last row

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors of the state by part and name."""
        parts = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        return parts | {"optimizer": optimizer_tensors(self.optimizer), "curve": {"losses": self.losses}}

    def load_tensors(self, tensors: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """Take over tensors as `tensors` returns them. Raises UserError when they are of another model."""
        load_exactly(self.model, tensors["model"], folder / "model.safetensors")
        load_exactly(self.ema, tensors["ema"], folder / "ema.safetensors")
        load_optimizer(self.optimizer, tensors["optimizer"])
        self.losses.copy_(tensors["curve"]["losses"])

    def targets(self, names: Iterable[tuple[str, str]]) -> dict[str, dict[str, Tensor]]:
        """Return tensors that others of these parts and names can be read into, to be taken over by `load_tensors`."""
        own = unfilled(self.model.parameters(), (name for part, name in names if part == "optimizer"))
        return self.tensors() | {"optimizer": own}


def train_latent_classifier(
    params: Classifier,
    latents: Latents,
    seed: int,
    work_dir: Path,
    fingerprint: str,
    device: torch.device,
    checkpoint_seconds: float,
    ranks: ProcessGroup = SINGLE_PROCESS,
    micro_batch: int | None = None,
    keeping: RetentionPolicy = RetentionPolicy(),  # noqa: B008  # an immutable value
) -> Generator[Progress, None, ClassifierState]:
    """Train the classifier to its end, from its newest checkpoint under `work_dir` if there is one.

    Several `ranks` share every batch, each in parts of `micro_batch` images, as in `train`.
    """
    state = ClassifierState(_untrained(params, latents, seed).to(device), params)
    load_latest(work_dir / "checkpoints", state, fingerprint)
    total = -(-round(params.epochs * latents.num_images) // params.batch_size)
    require_images(ranks, params.batch_size)
    gradients = SharedGradients(state.model, ranks)
    order, num = (
        Order(latents.num_images, seed, "classifier"),
        num_micro_batches(params.batch_size, ranks.world_size, micro_batch),
    )
    writing = Writer(work_dir / "checkpoints", fingerprint, checkpoint_seconds, keeping, active=ranks.is_main_process)
    with shutdown_requested() as asked, writing as writer:
        while state.update < total:
            noisy, t, labels = _batch(params, latents, order, seed, state.update, ranks.shard, device)
            loss = torch.zeros((), device=device)
            for part in range(num):
                with gradients.last_part(part == num - 1):
                    logits, truth = state.model(noisy[part::num], t[part::num]), labels[part::num]
                    of_part = len(truth) / params.batch_size * F.cross_entropy(logits, truth)
                    of_part.backward()
                loss += of_part.detach()
            state.optimizer.step()
            gradients.clear()
            with torch.no_grad():
                averages: list[Tensor] = list(state.ema.parameters())
                torch._foreach_lerp_(
                    averages, list(state.model.parameters()), 1 - ema_decay_at(params.ema, state.update)
                )
            state.losses += ranks.all_reduce(loss)
            state.update += 1
            ended = state.update == total
            row_due = ended or state.update % UPDATES_PER_ROW == 0
            if row_due:
                since = state.update - (state.rows[-1]["update"] if state.rows else 0)
                state.rows.append({"update": state.update, "images": state.update * params.batch_size})
                state.rows[-1]["cross_entropy"] = state.losses.item() / since
                state.losses.zero_()
            if ranks.any(ended or asked.number is not None or writer.due()):
                stop = ranks.any(asked.number is not None)
                if ended or stop:
                    writer.finish(state)
                else:
                    writer.save(state)
                if stop and not ended:
                    raise Stopped(asked.number or signal.SIGTERM)
            if row_due:
                yield Progress(state.update, total, "updates", f"cross entropy {state.rows[-1]['cross_entropy']:.3f}")
    return state


def _batch(
    params: Classifier, latents: Latents, order: Order, seed: int, update: int, own: slice, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents (N, C, H, W), times (N,) and labels (N,): those of an update's batch that are `own`."""
    count = params.batch_size
    indices = order.indices(update * count, count)
    generator = stream_generator(seed, "classifier", "noise", update)
    x = latents.draw(indices, generator, own).to(device)
    if params.affine is not None:
        x = affine_view(params.affine, count, generator, own)(x)
    t = torch.rand(count, generator=generator)[own].to(device)
    z = torch.randn(count, *latents.latent_shape, generator=generator)[own].to(device)
    labels = torch.as_tensor(latents.labels)[indices[own]].to(device)
    return interpolate(x, z, t), t, labels


@torch.no_grad()
def accuracy_by_level(model: LatentClassifier, latents: Latents, seed: int, device: torch.device) -> dict[str, float]:
    """Return the share of training latents put in their class, by time t in [0, 1] of the noise added."""
    generator = stream_generator(seed, "classifier", "accuracy")
    indices = torch.randperm(latents.num_images, generator=generator)[:MEASURED]
    x, labels = latents.draw(indices, generator), torch.as_tensor(latents.labels)[indices]
    z = torch.randn(x.shape, generator=generator)
    model.eval()
    shares = {}
    for level in LEVELS:
        t = torch.full((len(x),), level)
        noisy = interpolate(x, z, t)
        right = [
            (model(part.to(device), at.to(device)).argmax(1).cpu() == truth).sum().item()
            for part, at, truth in zip(noisy.split(100), t.split(100), labels.split(100), strict=True)
        ]
        shares[f"accuracy_t{level:g}"] = sum(right) / len(x)
    return shares


def _untrained(params: Classifier, latents: Latents, seed: int) -> LatentClassifier:
    channels, side, _ = latents.latent_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LatentClassifier(SIZES[params.size], channels, side, len(latents.classes))
