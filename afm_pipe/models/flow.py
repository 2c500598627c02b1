"""The generator as a transport map from latents at time s to latents at time t (paper section 3)."""

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
    """Map latents x (N, C, H, W) from times s to times t, (N,) each; by default from noise to data.

    Direct form: g(x_s, s, t); residual form: x_s - (s - t) g(x_s, s, t). Time 1 is noise, time 0 is data.
    """
    output = network(x, labels, s, t)
    if form == "direct":
        return output
    return x - output if s is None or t is None else x - (s - t)[:, None, None, None] * output


class Flow(nn.Module):
    """A generator network in direct or residual form (see `transport_map`), and its sampling."""

    def __init__(self, network: Generator, form: Form, nfe: int | Literal["any"]) -> None:
        super().__init__()
        self.network, self.form, self.nfe = network, form, nfe

    def forward(self, x: Tensor, labels: Tensor, s: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Map latents x (N, C, H, W) from times s to times t, (N,) each; by default from noise to data."""
        return transport_map(self.network, self.form, x, labels, s, t)

    def sample(self, z: Tensor, labels: Tensor, steps: int | None = None) -> Tensor:
        """Map noise z (N, C, H, W) to data in equal steps. Raises UserError as `num_steps` does."""
        steps = self.num_steps(steps)
        if self.network.times == "none":
            return self(z, labels)
        times = torch.linspace(1, 0, steps + 1, device=z.device)
        for s, t in zip(times[:-1], times[1:], strict=True):
            z = self(z, labels, s.expand(len(z)), t.expand(len(z)))
        return z

    def num_steps(self, requested: int | None) -> int:
        """Return the number of sampling steps. Raises UserError for a number that the generator is not trained for."""
        if self.nfe == "any":
            return requested or 1
        if requested not in (None, self.nfe):
            raise UserError(
                f"Found {requested} steps, expected {self.nfe}, for which the generator is trained: omit the number of "
                "steps, or use a generator trained with nfe any."
            )
        return self.nfe
