"""A generator as a map between times: from latents at time s to latents at time t (paper section 3)."""

from typing import Literal

import torch
from torch import Tensor, nn

from afm_pipe.models.generator import Generator
from afm_pipe.runtime.errors import UserError


class Flow(nn.Module):
    """G in direct form, g(x_s, s, t), or residual form, x_s - (s - t) g(x_s, s, t); noise is at time 1, data at 0."""

    def __init__(self, network: Generator, form: Literal["direct", "residual"], nfe: int | Literal["any"]) -> None:
        super().__init__()
        self.network, self.form, self.nfe = network, form, nfe

    def forward(self, x: Tensor, labels: Tensor, s: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Map latents x (N, C, H, W) at times s to times t, (N,) each; left out, from noise to data in one step."""
        output = self.network(x, labels, s, t)
        if self.form == "direct":
            return output
        return x - output if s is None or t is None else x - (s - t)[:, None, None, None] * output

    def sample(self, z: Tensor, labels: Tensor, steps: int | None = None) -> Tensor:
        """Take noise z (N, C, H, W) to data in equal steps: as many as it was trained for, or for any-step as asked.

        Raises UserError for a number of steps it was not trained for.
        """
        steps = self.num_steps(steps)
        if self.network.times == "none":
            return self(z, labels)
        times = torch.linspace(1, 0, steps + 1, device=z.device)
        for s, t in zip(times[:-1], times[1:], strict=True):
            z = self(z, labels, s.expand(len(z)), t.expand(len(z)))
        return z

    def num_steps(self, asked: int | None) -> int:
        """Return how many steps sampling takes. Raises UserError for a number it was not trained for."""
        if self.nfe == "any":
            return asked or 1
        if asked not in (None, self.nfe):
            raise UserError(
                f"Found {asked} steps asked of a generator trained for {self.nfe}, expected {self.nfe}: leave the "
                "number of steps out, or take a generator trained with nfe any."
            )
        return self.nfe
