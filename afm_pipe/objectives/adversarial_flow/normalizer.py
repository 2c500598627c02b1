"""Normalisation of the adversarial gradient at G's output (paper section 3).

It makes the balance between the adversarial and the transport loss independent of how steep D is: after it
|transport gradient| / |adversarial gradient| = 2 lambda_ot rms(G(z) - z).
"""

import torch
from torch import Tensor

TINY = 1e-8


class GradientNormalizer:
    """Divide gradients by the root of a running mean of their squared norm times their element count.

    The mean starts at 0 and is not corrected for it, as released: the first gradients come out up to
    1 / sqrt(1 - decay) times too large.
    """

    def __init__(self, decay: float, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        self.decay = decay
        self.mean_square = torch.zeros((), device=device, dtype=dtype)

    def __call__(self, gradient: Tensor) -> Tensor:
        """Take the gradient of a batch-mean loss at G's output (N, C, H, W); return it normalised.

        With sum(g^2) the squared norm over the whole batch and m its number of elements, the running mean is of
        m sum(g^2), so a stationary gradient leaves with an rms of 1 / m per element.
        """
        return gradient / self.divisor(gradient.square().sum(), gradient.numel())

    def divisor(self, square_sum: Tensor, elements: int) -> Tensor:
        """Take sum(g^2) and m of a batch, which may be in parts; return what its gradients are divided by."""
        square = square_sum * elements
        self.mean_square.lerp_(square.to(self.mean_square.dtype), 1 - self.decay)
        return self.mean_square.sqrt() + TINY
