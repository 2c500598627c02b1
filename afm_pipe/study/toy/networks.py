"""Generators and discriminators on a line: one MLP per seed, all seeds in one batched product.

Shapes: S seeds, N batch, F features, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODES = 64  # features per number; the scale makes numbers of size 1 pass through many periods (paper's toy)
_SCALE, _LONGEST_PERIOD, HIDDEN_LAYERS = 100.0, 10_000.0, 4


def codes(value: Tensor) -> Tensor:
    """Return sines and cosines of value (...) at geometric frequencies, (..., CODES)."""
    rates = torch.arange(CODES // 2, device=value.device) / (CODES // 2 - 1)
    angle = _SCALE * value[..., None] * torch.exp(-math.log(_LONGEST_PERIOD) * rates)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Mlps(nn.Module):
    """One MLP with four hidden layers per seed: (S, N, F) -> (S, N).

    Weights start with variance 1 / fan-in, three times torch's default: with that, a small generator starts at nearly
    one point for all noises, and most small GANs never leave it.
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
