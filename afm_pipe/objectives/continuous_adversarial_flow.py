"""Continuous adversarial flows: velocities judged by a discriminator instead of the squared error (arXiv 2604.11521).

D is a potential on points of the path, whose derivative along the true velocity is pushed to 1, along G's to -1. An
update is a step of D or a step of G, each on its own batch: updates 0 to `warmup` are of D, then update k is of D if
k mod (1 + n) < n, n = discriminator_updates. The weights begin with those of a flow-matching run, or are fresh.

Shapes: N images of a micro-batch; C, H, W of latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.model_files import build_discriminator
from afm_pipe.objectives import register
from afm_pipe.objectives.base import Hyperparameters, Learner, Term
from afm_pipe.objectives.flow_matching import FlowMatching, Path, PathBatches, settings_of
from afm_pipe.objectives.schedules import transport_at, transport_decayed

Network = Literal["discriminator", "generator"]


class Draw(NamedTuple):
    """The input of an update: the network that it steps, and its micro-batches."""

    network: Network
    parts: Sequence[Path]


def is_discriminator_turn(update: int, warmup: int, steps: int) -> bool:
    """Return whether an update, counted from 0, is of D: to the end of the warm-up, then `steps` to each one of G."""
    return update <= warmup or update % (1 + steps) < steps


class AlternatingBatches(PathBatches):
    """Draws points on paths for the network whose turn it is."""

    def draw(self, update: int, hyperparameters: Hyperparameters) -> Draw:  # type: ignore[override]
        """Return the network that an update steps, and this process's micro-batches."""
        warmup, steps = settings_of(self.run).warmup, self.run.discriminator_updates
        d_turn = is_discriminator_turn(update, warmup, steps)
        return Draw("discriminator" if d_turn else "generator", super().draw(update, hyperparameters))


@register
class ContinuousAdversarialFlow(FlowMatching):
    """The continuous adversarial flow objective.

    An update repeats the terms of the other network from its last step; they are 0 until its first one.
    """

    name = "continuous_adversarial_flow"
    d_terms = (
        Term(
            "d_adversarial",
            "Discriminator loss",
            "Mean (dD(v) − 1)² + (dD(g) + 1)², log scale; 2: undecided",
            log=True,
            role="adversarial_loss",
        ),
        Term("logit_centering", "Potential", "Mean D(x_t)², unweighted, log scale", log=True),
        Term("slope_real", "Slope along the data's velocity", "Mean dD(v); D pushes it to 1"),
        Term("slope_fake", "Slope along G's velocity", "Mean dD(g); D pushes it to −1, G to 1"),
        Term(
            "d_accuracy",
            "Discriminator accuracy",
            "Share of points with dD(v) > dD(g); 0.5: indistinguishable",
            role="d_accuracy",
        ),
        Term("d_grad_norm", "Discriminator's gradient norm", "Log scale", log=True),
    )
    terms = (
        *d_terms,
        Term("g_adversarial", "Generator loss", "Mean (dD(g) − 1)², log scale", log=True, role="adversarial_loss"),
        Term("g_transport", "Transport loss", "Mean squared velocity of G, unweighted, log scale", log=True),
        Term("velocity_error", "Velocity error", "Mean |g(x_t, t) − (z − x)|² at G's steps, log scale", log=True),
        Term("g_grad_norm", "Generator's gradient norm", "Log scale", log=True),
    )
    scheduled = (Term("transport", "Transport weight", "λ_ot, as scheduled"),)
    adversary = "discriminator"

    def build_networks(self) -> dict[str, nn.Module]:
        return super().build_networks() | {"discriminator": build_discriminator(self.config)}

    def build_buffers(self, device: torch.device) -> dict[str, Tensor]:
        return {"terms": torch.zeros(len(self.terms), device=device)}  # of the last step of each network

    def continued(self, weights: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """D begins with G's weights wherever it has the same tensor, unless the base has a D."""
        if "discriminator" in weights:
            return weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            fresh = self.build_networks()["discriminator"].state_dict()
        shared = {name: tensor for name, tensor in weights["generator"].items() if name in fresh}
        return {**weights, "discriminator": fresh | shared}

    def hyperparameters(self, update: int, num_images: int, clock: float | None = None) -> Hyperparameters:
        of_g = super().hyperparameters(update, num_images)
        phase = of_g.phase
        assert phase is not None
        weight = transport_at(self.run, update, num_images, clock)
        rates = {**of_g.lr, "discriminator": phase.lr_discriminator or of_g.lr["generator"]}
        return Hyperparameters(rates, {"transport": weight}, phase.gradient_clip, phase)

    def decayed(self, update: int, num_images: int, clock: float) -> bool:
        return transport_decayed(self.run, update, num_images, clock)

    def batches(
        self,
        latents: Latents,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
    ) -> AlternatingBatches:
        return AlternatingBatches(latents, self.run, device, group, micro_batch)

    def update(self, learner: Learner, batch: Draw, hyperparameters: Hyperparameters) -> Tensor:  # type: ignore[override]
        discriminator = learner.networks["discriminator"]
        backward = self._discriminator_backward
        if batch.network == "generator":
            backward = self._generator_backward
            discriminator.requires_grad_(False)
        values = []
        for index, part in enumerate(batch.parts):
            with learner.accumulate(batch.network, index == len(batch.parts) - 1):
                values.append(part.share * backward(learner, part, hyperparameters))
        total, *terms = learner.sum(values)
        norm = learner.step(batch.network, total, hyperparameters)
        discriminator.requires_grad_(True)
        first = 0 if batch.network == "discriminator" else len(self.d_terms)
        found = torch.stack([*terms, norm])
        learner.buffers["terms"][first : first + len(found)] = found
        return learner.buffers["terms"].clone()

    def _discriminator_backward(self, learner: Learner, part: Path, hp: Hyperparameters) -> Tensor:
        """Backpropagate D's loss on a micro-batch; return the loss and its terms, unweighted by the share."""
        with torch.no_grad():
            generated = learner.networks["generator"](part.x, part.labels, part.t)
        velocities = torch.stack([part.velocity, generated])
        potential, (real, fake) = learner.module("discriminator")(part.x, part.labels, part.t, velocities)
        adversarial = (real - 1).square().mean() + (fake + 1).square().mean()
        centering = potential.square().mean()
        loss = adversarial + self.run.logit_centering * centering
        (part.share * loss).backward()
        accuracy = (real > fake).to(real.dtype).mean()
        return torch.stack([loss, adversarial, centering, real.mean(), fake.mean(), accuracy]).detach()

    def _generator_backward(self, learner: Learner, part: Path, hp: Hyperparameters) -> Tensor:
        """Backpropagate G's loss on a micro-batch; return the loss and its terms, unweighted by the share."""
        velocity = learner.module("generator")(part.x, part.labels, part.t)
        discriminator = learner.networks["discriminator"]  # without gradients of its weights
        _, (slope,) = discriminator(part.x, part.labels, part.t, velocity[None])
        adversarial, transport = (slope - 1).square().mean(), velocity.square().mean()
        loss = adversarial + hp.weights["transport"] * transport
        (part.share * loss).backward()
        error = (velocity - part.velocity).square().mean()
        return torch.stack([loss, adversarial, transport, error]).detach()

    def example_batch(self, count: int, penalized: int | None = None) -> Draw:
        return self.example_updates(count)[0][0]

    def example_updates(self, count: int, penalized: int | None = None) -> list[tuple[Any, float]]:
        """Return a step of D and one of G, in their shares after the warm-up."""
        steps, parts = self.run.discriminator_updates, super().example_batch(count)
        of_d, of_g = steps / (1 + steps), 1 / (1 + steps)
        return [(Draw("discriminator", parts), of_d), (Draw("generator", parts), of_g)]

    def progress(self, row: Mapping[str, float]) -> str:
        return f"slopes {row['slope_real']:.2f} and {row['slope_fake']:.2f}"
