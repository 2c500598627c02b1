"""The data of the toy experiment, four narrow Gaussians in one dimension, and its closed forms.

Shapes: K classes; ... any. Noise is N(0, 1), x_t = (1 - t) x + t z.
"""

import torch
from torch import Tensor

MEANS = (-1.5, -0.5, 0.5, 1.5)
STD = 0.05
CLASSES = len(MEANS)
_BOUND, _BISECTIONS = 4.0, 60  # all quantiles lie within the bound; the bisections reach float64 precision


def draw(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return samples of the data and their classes, each of `shape`."""
    labels = torch.randint(CLASSES, shape, generator=generator)
    return torch.tensor(MEANS)[labels] + STD * torch.randn(shape, generator=generator), labels


def cdf(x: Tensor) -> Tensor:
    """Return the cumulative distribution function of the data at x."""
    return torch.special.ndtr((x[..., None] - x.new_tensor(MEANS)) / STD).mean(-1)


def quantile(probability: Tensor) -> Tensor:
    """Return the quantiles of the data, by bisection (float64 in, float64 out)."""
    low, high = torch.full_like(probability, -_BOUND), torch.full_like(probability, _BOUND)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = cdf(middle) < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def optimal_map(z: Tensor) -> Tensor:
    """Return the optimal transport of noise to data: in one dimension, equal quantiles are matched."""
    return quantile(torch.special.ndtr(z.double())).to(z.dtype)


def noise_grid(points: int) -> Tensor:
    """Return the midpoints (float64, ascending) of `points` equally probable intervals of N(0, 1)."""
    return torch.special.ndtri((torch.arange(points, dtype=torch.float64) + 0.5) / points)


def log_posterior(x_t: Tensor, t: Tensor) -> Tensor:
    """Return log p(class | x_t, t) (..., K), the exact classifier."""
    variance = _variance(t)[..., None]  # (..., 1), equal for all classes
    mean = (1 - t)[..., None] * x_t.new_tensor(MEANS)  # (..., K)
    return torch.log_softmax(-(x_t[..., None] - mean).square() / (2 * variance), dim=-1)


def velocity(x_t: Tensor, t: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Return E[z - x | x_t, class] with classifier-free guidance: v + scale (v_class - v); scale 1 is no guidance."""
    means = x_t.new_tensor(MEANS)
    slope = (t - (1 - t) * STD**2) / _variance(t)
    of_class = slope[..., None] * (x_t[..., None] - (1 - t)[..., None] * means) - means  # (..., K)
    of_all = (log_posterior(x_t, t).exp() * of_class).sum(-1)
    return of_all + scale * (of_class.gather(-1, labels[..., None]).squeeze(-1) - of_all)


def guided_flow(z: Tensor, labels: Tensor, scale: float, steps: int = 1000) -> Tensor:
    """Return the end of the exact flow from noise z with classifier-free guidance, by Heun's method."""
    x, width = z, 1 / steps
    for index in range(steps):
        s = torch.full_like(z, 1 - index * width)
        t = s - width
        first = velocity(x, s, labels, scale)
        second = velocity(x - width * first, t, labels, scale)
        x = x - width * (first + second) / 2
    return x


def wasserstein(samples: Tensor) -> Tensor:
    """Return W1 between sets of samples (..., n) and the data: the mean distance of their quantiles."""
    points = samples.shape[-1]
    probability = (torch.arange(points, dtype=torch.float64, device=samples.device) + 0.5) / points
    return (samples.double().sort(-1).values - quantile(probability)).abs().mean(-1)


def _variance(t: Tensor) -> Tensor:
    """Return the variance of x_t within a class."""
    return ((1 - t) * STD).square() + t.square()
