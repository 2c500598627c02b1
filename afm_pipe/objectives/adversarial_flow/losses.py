"""The loss terms of adversarial flow models as pure functions (symbols as in paper section 3).

Shapes: N batch, n penalized images; logits (N,), latents (N, C, H, W). Every term is a 0-d tensor.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Logits(NamedTuple):
    """D's logits in a step of D: of real and generated latents, and of those that the penalties compare."""

    real: Tensor  # (N,)
    fake: Tensor  # (N,)
    real_penalized: Tensor  # (n,), of the first n real latents, in the penalties' precision
    fake_penalized: Tensor  # (n,)
    real_perturbed: Tensor  # (n,)
    fake_perturbed: Tensor  # (n,)


def relativistic(higher: Tensor, lower: Tensor) -> Tensor:
    """Return mean softplus(-(higher - lower)); `higher` are logits of real latents for D, of generated ones for G."""
    return F.softplus(lower - higher).mean()


def gradient_penalty(logits: Tensor, perturbed: Tensor, epsilon: float, weighting: Tensor | float = 1.0) -> Tensor:
    """Return mean w ((D(u + eps noise) - D(u)) / eps)^2 of logits (n,) at u and at u + eps noise; 0 where n = 0.

    A finite difference, so that no second-order gradient is needed.
    """
    if not len(perturbed):
        return logits.new_zeros(())
    return (weighting * ((perturbed - logits) / epsilon).square()).mean()


def logit_centering(real: Tensor, fake: Tensor) -> Tensor:
    """Return mean (D(x) + D(G(z)))^2, which keeps logits around 0."""
    return (real + fake).square().mean()


def transport_cost(output: Tensor, source: Tensor, weighting: Tensor | float = 1.0) -> Tensor:
    """Return the optimal transport loss: mean over samples of |G(x_s) - x_s|^2 / (elements * w)."""
    return ((output - source).square().flatten(1).mean(1) / weighting).mean()


def step_weighting(s: Tensor, t: Tensor) -> Tensor:
    """Return w(s, t) = max(|s - t|, 0.001) for source and target times (N,)."""
    return (s - t).abs().clamp(min=0.001)


def perturb(x: Tensor, noise: Tensor, epsilon: float) -> Tensor:
    """Return x + epsilon noise."""
    return torch.add(x, noise, alpha=epsilon)


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) x + t z for x and z (N, ...) and times t (N,), or times of the shape of x."""
    return torch.lerp(x, z, t.reshape(*t.shape, *[1] * (x.ndim - t.ndim)))
