"""Frechet distance between two sets of features, each taken for a Gaussian.

Shapes: N samples, D features. All in float64.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afm_pipe.runtime.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Mean and scatter of the features seen so far; add batches, or parts counted apart, in any grouping.

    `mu` (D,) is the mean, `scatter` (D, D) the sum of outer products of what is left after it.
    """

    count: int
    mu: Array
    scatter: Array

    @classmethod
    def none(cls, dim: int) -> "Statistics":
        """Return the statistics of no samples."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: np.ndarray) -> "Statistics":
        """Return the statistics of one batch of features (N, D)."""
        x = features.astype(np.float64)
        mu = x.mean(axis=0)
        centred = x - mu
        return cls(len(x), mu, centred.T @ centred)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Merge with the statistics of other samples, exact but for float64 rounding (Chan et al. 1983)."""
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mu - self.mu
        mu = self.mu + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Statistics(count, mu, self.scatter + other.scatter + between)

    @property
    def sigma(self) -> Array:
        """Unbiased covariance (D, D). Raises UserError for fewer than two samples."""
        if self.count < 2:
            raise UserError(f"Found {self.count} images, expected at least 2 to take a covariance: give more images.")
        return self.scatter / (self.count - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S2^.5 S1 S2^.5)^.5) for means (D,) and covariances (D, D).

    Equal to the usual form with (S1 S2)^.5, but of symmetric matrices alone: real, faster, and free of scipy's sqrtm.
    Not below zero: what rounding leaves there is clipped. Raises UserError when an input is not finite.
    """
    return frechet_and_map(mu1, sigma1, mu2, sigma2)[0]


def frechet_and_map(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> tuple[float, Array]:
    """Return the Frechet distance, and the optimal map's matrix (D, D) from the first Gaussian to the second.

    The gradient of the distance by S1 is the identity less that matrix.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    for name, value in {"mean": mu1 - mu2, "covariance": sigma1 + sigma2}.items():
        if not np.isfinite(value).all():
            raise UserError(f"Found a feature {name} that is not finite, expected numbers: check the images compared.")
    values, vectors = np.linalg.eigh(sigma2)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # (D, D)
    between, axes = np.linalg.eigh(root @ sigma1 @ root)
    lengths = np.sqrt(between.clip(min=0))  # (D,)
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * lengths.sum()
    # Directions in which samples do not vary have no gradient: a pseudo-inverse.
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 1e-7 * lengths.max(initial=0.0))
    half = root @ axes  # (D, D)
    return float(max(distance, 0.0)), (half * inverse) @ half.T
