"""95 % confidence intervals of metrics over the draw of N samples, for fixed real images.

They do not cover the bias of a Frechet distance of N samples. Classes have fixed shares, so only the variance within a
class counts.

Legend: N samples, M real images, D features.
"""

import math

import numpy as np

from afm_pipe.evaluation.frechet import Array
from afm_pipe.evaluation.measures import spread_evenly

Z95 = 1.959963984540054  # standard deviations of a normal distribution that contain 95 %
KERNEL_ROWS = 5000  # samples, and real images, from which the variance of a kernel distance is estimated
BLOCK = 1024  # rows at a time, to bound memory


def frechet_error(features: np.ndarray, labels: np.ndarray, mu: Array, transport: Array) -> float:
    """Return the standard error of a Frechet distance, to first order.

    A sample x contributes (2 (x - m1)(m1 - m2) + (x - m1)' (I - T) (x - m1)) / N, where T, `transport` (D, D), is the
    map of `frechet_distance`, and m2, `mu` (D,), the mean of the real images. One matrix serves all samples; a
    jackknife would compute N distances.
    """
    own = features.mean(axis=0, dtype=np.float64)
    form, twice = np.eye(len(mu)) - transport, 2 * (own - mu)
    contributions = np.empty(len(features))
    for start in range(0, len(features), BLOCK):
        x = features[start : start + BLOCK].astype(np.float64) - own  # (b, D)
        contributions[start : start + BLOCK] = x @ twice + ((x @ form) * x).sum(axis=1)
    return stratified_error(contributions, labels)


def kernel_error(
    real: np.ndarray, features: np.ndarray, labels: np.ndarray, per_subset: np.ndarray, scale: float = 1.0
) -> float:
    """Return the standard error of a kernel distance: the mean of `per_subset`, the values of random subsets.

    Features are divided by `scale`. To first order, a sample x contributes
    2 (mean k(x, samples) - mean k(x, real)) / N; the choice of subsets adds its own variance.
    """
    rows, columns = (spread_evenly(len(each), KERNEL_ROWS) for each in (features, real))
    x, y = features[rows].astype(np.float64) / scale, real[columns].astype(np.float64) / scale
    contributions = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        a = x[start : start + BLOCK]
        contributions[start : start + BLOCK] = 2 * (_kernel(a, x).mean(axis=1) - _kernel(a, y).mean(axis=1))
    of_subsets = float(per_subset.var(ddof=1)) / len(per_subset) if len(per_subset) > 1 else 0.0
    return math.sqrt(stratified_error(contributions, labels[rows]) ** 2 * len(x) / len(features) + of_subsets)


def normal_interval(value: float, error: float, minimum: float = -math.inf) -> list[float]:
    """Return the interval of a value with a standard error, clipped at `minimum`."""
    return [max(value - Z95 * error, minimum), value + Z95 * error]


def fraction(hits: int, count: int) -> tuple[float, list[float]]:
    """Return a fraction, `hits` of `count`, and its interval (Wilson 1927)."""
    p, z2 = hits / count, Z95**2
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    return p, [max(middle - half, 0.0), min(middle + half, 1.0)]


def stratified_error(contributions: Array, labels: np.ndarray) -> float:
    """Return the standard error of a mean over samples with a fixed number per class."""
    _, classes = np.unique(labels, return_inverse=True)
    counts = np.bincount(classes)
    means = np.bincount(classes, contributions) / counts
    degrees = len(contributions) - len(counts)
    if degrees < 1:
        return math.inf
    return math.sqrt(np.square(contributions - means[classes]).sum() / degrees / len(contributions))


def _kernel(x: Array, y: Array) -> Array:
    inner = x @ y.T / x.shape[1] + 1
    return inner * inner * inner
