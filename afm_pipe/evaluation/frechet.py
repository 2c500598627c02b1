"""Frechet distance between two sets of features, each modeled as a Gaussian.

Legend: N samples, D features. Everything is float64.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afm_pipe.runtime.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Mean `mu` (D,) and scatter (D, D), the sum of outer products of centered features; `+` merges two sets."""

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
        centered = x - mu
        return cls(len(x), mu, centered.T @ centered)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Merge with the statistics of other samples (Chan et al. 1983)."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mu - self.mu
        mu = self.mu + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Statistics(count, mu, self.scatter + other.scatter + between)

    @property
    def sigma(self) -> Array:
        """Unbiased covariance (D, D). Raises UserError for fewer than two samples."""
        if self.count < 2:
            raise UserError(f"Found {self.count} images, expected at least 2 for a covariance: use more images.")
        return self.scatter / (self.count - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> tuple[float, Array]:
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S2^.5 S1 S2^.5)^.5) for means (D,) and covariances (D, D), and a map.

    The distance equals the usual form with (S1 S2)^.5, but needs only eigenvalues of symmetric matrices: it is real,
    faster, and without sqrtm. Rounding errors below zero are clipped. The map (D, D) is the matrix of the optimal
    transport from the first Gaussian to the second; the gradient of the distance with respect to S1 is I minus it.
    Raises UserError for non-finite input.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    for name, value in {"mean": mu1 - mu2, "covariance": sigma1 + sigma2}.items():
        if not np.isfinite(value).all():
            raise UserError(f"Found a non-finite feature {name}, expected finite values: check the images.")
    values, vectors = np.linalg.eigh(sigma2)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # (D, D)
    between, axes = np.linalg.eigh(root @ sigma1 @ root)
    lengths = np.sqrt(between.clip(min=0))  # (D,)
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * lengths.sum()
    # A pseudo-inverse: directions without variance have no gradient.
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 1e-7 * lengths.max(initial=0.0))
    half = root @ axes  # (D, D)
    return float(max(distance, 0.0)), (half * inverse) @ half.T
