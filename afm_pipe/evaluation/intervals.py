"""Intervals beside measures: what they would be, in 95 of 100 cases, of other samples of the same generator.

They cover the noise of drawing N samples, not the bias that a Frechet distance of N samples has, and take the real
images as given. Classes are drawn in equal shares, so noise counts within a class.

Shapes: N samples, M real images, D features.
"""

import math

import numpy as np

from afm_pipe.evaluation.frechet import Array

Z95 = 1.959963984540054  # of a normal distribution within which 95 % lie
KERNEL_ROWS = 5000  # samples, and real images, that the noise of a kernel distance is estimated on
BLOCK = 1024  # rows at a time, to bound memory


def frechet_error(features: np.ndarray, labels: np.ndarray, mu: Array, pull: Array) -> float:
    """Return the standard error of a Frechet distance, exact to first order, from the gradient at hand.

    A sample moves the distance by 2 (x - m1)(m1 - m2) + (x - m1)' (I - T) (x - m1) over N, where T, `pull` (D, D), is
    the optimal map from the samples' Gaussian to the real images', whose mean is `mu` (D,): one matrix for all samples
    instead of a distance without each (jackknife).
    """
    own = features.mean(axis=0, dtype=np.float64)
    form, twice = np.eye(len(mu)) - pull, 2 * (own - mu)
    moves = np.empty(len(features))
    for start in range(0, len(features), BLOCK):
        x = features[start : start + BLOCK].astype(np.float64) - own  # (b, D)
        moves[start : start + BLOCK] = x @ twice + ((x @ form) * x).sum(axis=1)
    return _error(moves, labels)


def kernel_error(
    real: np.ndarray, features: np.ndarray, labels: np.ndarray, per_subset: np.ndarray, scale: float = 1.0
) -> float:
    """Return the standard error of a kernel distance that is a mean over random subsets, `per_subset` their values.

    Features count over `scale`.

    A sample moves the distance by 2 (mean k(x, samples) - mean k(x, real)) over N, to first order; the drawing of
    subsets adds its own noise.
    """
    rows, columns = _some(len(features)), _some(len(real))
    x, y = features[rows].astype(np.float64) / scale, real[columns].astype(np.float64) / scale
    moves = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        a = x[start : start + BLOCK]
        moves[start : start + BLOCK] = 2 * (_kernel(a, x).mean(axis=1) - _kernel(a, y).mean(axis=1))
    drawing = float(per_subset.var(ddof=1)) / len(per_subset) if len(per_subset) > 1 else 0.0
    return math.sqrt(_error(moves, labels[rows]) ** 2 * len(x) / len(features) + drawing)


def around(value: float, error: float, least: float = -math.inf) -> list[float]:
    """Return the 95 % interval of a value with a standard error; not below `least`."""
    return [max(value - Z95 * error, least), value + Z95 * error]


def wilson(hits: int, count: int) -> list[float]:
    """Return the 95 % interval of a share, `hits` of `count` (Wilson 1927): never outside 0 to 1."""
    share, z2 = hits / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return [max(middle - half, 0.0), min(middle + half, 1.0)]


def fraction(hits: int, count: int) -> tuple[float, list[float]]:
    """Return a fraction and its interval."""
    return hits / count, wilson(hits, count)


def _error(moves: Array, labels: np.ndarray) -> float:
    """Return the standard error of a mean over samples drawn in fixed numbers from each class."""
    _, classes = np.unique(labels, return_inverse=True)
    counts = np.bincount(classes)
    means = np.bincount(classes, moves) / counts
    free = len(moves) - len(counts)
    if free < 1:
        return math.inf
    return math.sqrt(np.square(moves - means[classes]).sum() / free / len(moves))


def _some(count: int) -> np.ndarray:
    most = min(count, KERNEL_ROWS)
    return np.arange(most) * count // most


def _kernel(x: Array, y: Array) -> Array:
    inner = x @ y.T / x.shape[1] + 1
    return inner * inner * inner
