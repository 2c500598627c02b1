"""Flow matching: regression of the velocity z - x of x_t = (1 - t) x + t z (Lipman et al. 2023; Ma et al. 2024).

Shapes: N images of a micro-batch; C, H, W of latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.data.move import to_device
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.model_files import build_generator
from afm_pipe.objectives import register
from afm_pipe.objectives.adversarial_flow.losses import interpolate
from afm_pipe.objectives.base import Hyperparameters, Learner, Term, num_micro_batches
from afm_pipe.objectives.of_runs import RunObjective
from afm_pipe.objectives.schedules import phase_at
from afm_pipe.params import Run
from afm_pipe.params.flow import FlowSettings


class Path(NamedTuple):
    """A micro-batch of points on straight paths from data to noise."""

    x: Tensor  # (N, C, H, W), x_t
    velocity: Tensor  # (N, C, H, W), z - x
    labels: Tensor  # (N,), some of them that of no class
    t: Tensor  # (N,)
    share: float = 1.0  # of the whole batch


class PathBatches:
    """Draws points on paths as a function of (seed, images seen)."""

    def __init__(
        self, latents: Latents, run: Run, device: torch.device, group: ProcessGroup, micro_batch: int | None
    ) -> None:
        self.latents, self.run, self.device, self.shard = latents, run, device, group.shard
        self.num_micro_batches = num_micro_batches(run.batch_size, group.world_size, micro_batch)
        self.order, self.labels = Order(latents.num_images, run.seed, "flow"), torch.as_tensor(latents.labels)

    def draw(self, update: int, hyperparameters: Hyperparameters) -> list[Path]:
        """Return this process's micro-batches; every process draws the random numbers of the whole batch."""
        count, seen, shard = self.run.batch_size, update * self.run.batch_size, self.shard
        generator, settings = stream_generator(self.run.seed, "flow", "noise", seen), settings_of(self.run)
        indices = self.order.indices(seen, count)
        x = self.latents.draw(indices, generator, shard)
        z = torch.randn(count, *self.latents.latent_shape, generator=generator)[shard]
        if settings.times == "uniform":
            t = torch.rand(count, generator=generator)
        else:
            t = torch.randn(count, generator=generator).sigmoid()
        dropped = torch.rand(count, generator=generator) < settings.label_dropout
        labels = torch.where(dropped, self.latents.num_classes, self.labels[indices])[shard]
        drawn = interpolate(x, z, t[shard]), z - x, labels, t[shard]
        points, velocity, labels, t = to_device(drawn, self.device)
        parts = [slice(part, None, self.num_micro_batches) for part in range(self.num_micro_batches)]
        return [Path(points[at], velocity[at], labels[at], t[at], len(t[at]) / count) for at in parts]


@register
class FlowMatching(RunObjective):
    """Mean |g(x_t, t, label) - (z - x)|^2."""

    name = "flow_matching"
    terms: ClassVar[tuple[Term, ...]] = (
        Term("velocity_error", "Velocity error", "Mean |g(x_t, t) − (z − x)|², log scale", log=True),
        Term("g_grad_norm", "Generator's gradient norm", "Log scale", log=True),
    )

    def build_networks(self) -> dict[str, nn.Module]:
        return {"generator": build_generator(self.config)}

    def hyperparameters(self, update: int, num_images: int, clock: float | None = None) -> Hyperparameters:
        phase = phase_at(self.run, update, num_images)
        return Hyperparameters({"generator": phase.lr or self.run.lr}, {}, phase.gradient_clip, phase)

    def batches(
        self,
        latents: Latents,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
    ) -> PathBatches:
        return PathBatches(latents, self.run, device, group, micro_batch)

    def update(self, learner: Learner, batch: Sequence[Path], hyperparameters: Hyperparameters) -> Tensor:
        losses = []
        for index, part in enumerate(batch):
            with learner.accumulate("generator", index == len(batch) - 1):
                velocity = learner.module("generator")(part.x, part.labels, part.t)
                loss = part.share * (velocity - part.velocity).square().mean()
                loss.backward()
            losses.append(loss.detach()[None])
        total = learner.sum(losses)
        return torch.cat([total, learner.step("generator", total[0], hyperparameters)[None]])

    def example_batch(self, count: int, penalized: int | None = None) -> Any:
        latents, labels = torch.empty(count, *self.config.latent_shape), torch.zeros(count, dtype=torch.int64)
        return [Path(latents, torch.empty_like(latents), labels, torch.empty(count))]

    def example_forward(self, networks: Mapping[str, nn.Module], count: int) -> Tensor:
        (part,) = FlowMatching.example_batch(self, count)
        return networks["generator"](part.x, part.labels, part.t)

    def progress(self, row: Mapping[str, float]) -> str:
        return f"velocity error {row['velocity_error']:.3f}"


def settings_of(run: Run) -> FlowSettings:
    """Return the section `flow` of a run, which params require."""
    assert run.flow is not None
    return run.flow
