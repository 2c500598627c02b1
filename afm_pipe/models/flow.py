"""A generator as a map between times: from latents at time s to latents at time t (paper section 3)."""

from typing import Literal

import torch
from torch import Tensor, nn

from afm_pipe.models.generator import Generator
from afm_pipe.runtime.errors import UserError

Form = Literal["direct", "residual"]


def transport_map(
    network: nn.Module,
    form: Form,
    x: Tensor,
    labels: Tensor,
    s: Tensor | None = None,
    t: Tensor | None = None,
) -> Tensor:
    """Map latents x (N, C, H, W) at times s to times t, (N,) each; left out, from noise to data in one step.

    Direct form: g(x_s, s, t); residual form: x_s - (s - t) g(x_s, s, t). Noise is at time 1, data at 0.
    """
    output = network(x, labels, s, t)
    if form == "direct":
        return output
    return x - output if s is None or t is None else x - (s - t)[:, None, None, None] * output


class Flow(nn.Module):
    """A generator in direct or residual form, as `transport_map` applies it, and its sampling."""

    def __init__(self, network: Generator, form: Form, nfe: int | Literal["any"]) -> None:
        super().__init__()
        self.network, self.form, self.nfe = network, form, nfe

    def forward(self, x: Tensor, labels: Tensor, s: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Map latents x (N, C, H, W) at times s to times t, (N,) each; left out, from noise to data in one step."""
        return transport_map(self.network, self.form, x, labels, s, t)

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
