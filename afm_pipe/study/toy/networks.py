"""Networks of the toy experiment: one MLP per seed, evaluated for all seeds in one batched product.

Shapes: S seeds, N batch, F features, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.study.toy import mixture

EMBEDDING = 64  # features per number
HIDDEN_LAYERS = 4
_SCALE, _LONGEST_PERIOD = 100.0, 10_000.0  # of the paper's toy: numbers of size 1 span many periods


def embed(*values: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return sines and cosines of values (S, N) at geometric frequencies, and of classes where given: (S, N, F)."""
    rates = torch.arange(EMBEDDING // 2, device=values[0].device) / (EMBEDDING // 2 - 1)
    rates = torch.exp(-math.log(_LONGEST_PERIOD) * rates)
    if labels is not None:
        values = (*values, labels - (mixture.CLASSES - 1) / 2)  # centered, spaced as the data
    angles = [_SCALE * value[..., None] * rates for value in values]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=-1)


class Mlps(nn.Module):
    """One MLP with four hidden layers per seed: (S, N, F) -> (S, N).

    Weights start with variance 1 / fan-in, three times torch's default. With the default, a small generator maps all
    noise to nearly one point at first, from which most small GANs do not recover.
    """

    def __init__(self, seeds: int, features: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [features, *[width] * HIDDEN_LAYERS, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            for parameters, rows, variance in ((self.weights, fan_in, 1 / fan_in), (self.biases, 1, 1 / (3 * fan_in))):
                uniform = 2 * torch.rand(seeds, rows, fan_out, generator=generator) - 1  # variance 1/3
                parameters.append(nn.Parameter(uniform * math.sqrt(3 * variance)))

    def forward(self, features: Tensor) -> Tensor:
        h = features  # (S, N, F)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h, weight)  # (S, N, W)
            if layer < HIDDEN_LAYERS:
                h = F.silu(h)
        return h.squeeze(-1)  # (S, N)


class Map(nn.Module):
    """A generator x_s -> x_t, (S, N) each: direct for one step, residual x_s - (s - t) g(x_s, s, t) for several."""

    def __init__(self, network: Mlps, steps: int, conditional: bool) -> None:
        super().__init__()
        self.network, self.steps, self.conditional = network, steps, conditional

    def forward(self, x: Tensor, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        times = () if self.steps == 1 else (s, t)
        output = self.network(embed(x, *times, labels=labels if self.conditional else None))
        return output if self.steps == 1 else x - (s - t) * output


class Velocity(nn.Module):
    """An Euler step of flow matching along the learned velocity v(x_s, s)."""

    def __init__(self, network: Mlps) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x - (s - t) * self.network(embed(x, s))


class Posterior(nn.Module):
    """The guiding classifier: the exact posterior, where the paper trains a network."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return mixture.log_posterior(x_t, t)


@torch.no_grad()
def transport(flow: nn.Module, noise: Tensor, steps: int, labels: Tensor) -> Tensor:
    """Map noise (S, N) of classes (S, N) to data in equal steps."""
    x, times = noise, torch.linspace(1, 0, steps + 1, device=noise.device)
    for s, t in zip(times[:-1], times[1:], strict=True):
        x = flow(x, s.expand_as(x), t.expand_as(x), labels)
    return x
