"""The velocity network of flow matching, and samples as solutions of its ODE.

Time 1 is noise and time 0 data: x_t = (1 - t) x + t z, whose velocity is z - x. The network has SiT's weights and SiT's
convention (Ma et al. 2024): its time runs from noise at 0 to data at 1, is not multiplied by 1000, and its output is
the velocity toward data. `VelocityNetwork` converts both.
"""

import math

import torch
from torch import Tensor, nn

from afm_pipe.models.dit import FREQUENCIES, TimestepEmbedder
from afm_pipe.models.generator import Generator
from afm_pipe.params.flow import OdeSampling
from afm_pipe.params.sizes import ModelSize


class FlowTimeEmbedder(TimestepEmbedder):
    """SiT's time embedding, in the dtype of the weights and differentiable in time."""

    def forward(self, t: Tensor) -> Tensor:  # (N,) -> (N, D)
        dtype, half = next(self.mlp.parameters()).dtype, FREQUENCIES // 2
        exponents = -math.log(10000) / half * torch.arange(half, dtype=torch.float64, device=t.device)
        angles = t.to(dtype)[:, None] * exponents.exp().to(dtype)  # (N, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class VelocityNetwork(Generator):
    """The velocity v(x_t, t, label), (N, C, H, W); `num_labels` counts the label of no class, if there is one."""

    time_embedder = FlowTimeEmbedder

    def __init__(
        self, size: ModelSize, channels: int, latent_size: int, num_labels: int, qk_norm: bool = False
    ) -> None:
        super().__init__(size, channels, latent_size, num_labels, times="source", qk_norm=qk_norm)

    def forward(self, x: Tensor, labels: Tensor, s: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Return the velocities of latents x (N, C, H, W) of classes `labels` (N,) at times s (N,)."""
        assert s is not None, "a velocity needs a time"
        return -super().forward(x, labels, 1 - s)


class VelocityFlow(nn.Module):
    """A velocity network and the solver that draws samples with it."""

    def __init__(self, network: VelocityNetwork, sampling: OdeSampling) -> None:
        super().__init__()
        self.network, self.sampling = network, sampling

    @property
    def nfe(self) -> int:
        """Forward passes of the network per sample, with the default number of steps."""
        return self.sampling.passes()

    def num_steps(self, requested: int | None) -> int:
        """Return the number of steps; a velocity allows any."""
        return requested or self.sampling.steps

    def sample(self, z: Tensor, labels: Tensor, steps: int | None = None) -> Tensor:
        """Map noise z (N, C, H, W) of classes `labels` (N,) to data."""
        steps = self.num_steps(steps)
        for step in range(steps):
            t, after = 1 - step / steps, 1 - (step + 1) / steps
            velocity = self.velocity(z, labels, t)
            if self.sampling.solver == "heun":
                ahead = self.velocity(z + (after - t) * velocity, labels, after)
                velocity = (velocity + ahead) / 2
            z = z + (after - t) * velocity
        return z

    def velocity(self, x: Tensor, labels: Tensor, t: float) -> Tensor:
        """Return the velocities at one time, guided where the settings say so."""
        times = x.new_full((len(x),), t)
        if not self.sampling.guides(t):
            return self.network(x, labels, times)
        nothing = torch.full_like(labels, self.network.y_embedder.embedding_table.num_embeddings - 1)
        # Two passes instead of one over 2 N latents, so that memory and rounding are those of an unguided sample.
        free = self.network(x, nothing, times)
        return free + self.sampling.guidance_scale * (self.network(x, labels, times) - free)
