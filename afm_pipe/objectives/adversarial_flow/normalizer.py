"""Normalization of the adversarial gradient at G's output (paper section 3).

It makes the balance between the adversarial and the transport loss independent of how steep D is: after it
|transport gradient| / |adversarial gradient| = 2 lambda_ot rms(G(z) - z).
"""

from torch import Tensor

EPSILON = 1e-8


def divisor(mean_square: Tensor, square_sum: Tensor, elements: int, decay: float) -> Tensor:
    """Update the running mean of m sum(g^2) in place; return its root, by which to divide the gradients.

    sum(g^2) = `square_sum` is the squared norm over the whole batch, and m = `elements` its number of elements, so a
    stationary gradient is scaled to an rms of 1 / m. The mean starts at 0 without bias correction, as released, so the
    first gradients are up to 1 / sqrt(1 - decay) times too large.
    """
    square = square_sum * elements
    mean_square.lerp_(square.to(mean_square.dtype), 1 - decay)
    return mean_square.sqrt() + EPSILON
