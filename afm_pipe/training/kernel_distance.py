"""The kernel inception distance (KID) between two sets of features, for the monitor and the evaluation.

Shapes: N samples, D features.
"""

import math

import numpy as np

TILE = 250  # rows and columns of a block of kernel values


def kid(reference: np.ndarray, features: np.ndarray, subsets: int, subset_size: int, seed: int) -> float:
    """Return the kernel distance (unbiased MMD^2, cubic kernel) between features (N, D) and reference features.

    It is the mean over random subsets drawn from `seed`, as in clean-fid, which uses the global random state. It may be
    negative near zero. Computed in float64, since features of a small classifier lose precision in float32.
    """
    return float(kid_of_subsets(reference, features, subsets, subset_size, seed).mean())


def kid_of_subsets(
    reference: np.ndarray, features: np.ndarray, subsets: int, subset_size: int, seed: int, scale: float = 1.0
) -> np.ndarray:
    """Return the kernel distance of each random subset, (subsets,), with features divided by `scale`."""
    random = np.random.RandomState(seed % 2**32)  # clean-fid's draws, in its order
    size, values = min(len(reference), len(features), subset_size), []
    for _ in range(subsets):
        x = _with_one(features[random.choice(len(features), size, replace=False)], scale)
        y = _with_one(reference[random.choice(len(reference), size, replace=False)], scale)
        within = _cubes_within(x) + _cubes_within(y)
        values.append(within / (size * (size - 1)) - 2 * _cubes(x, y) / size**2)
    return np.array(values)


def _with_one(features: np.ndarray, scale: float) -> np.ndarray:
    """Return rows (n, D + 1) float64 with inner products x y / (scale^2 D) + 1, whose cube is the kernel."""
    count, width = features.shape
    rows = np.empty((count, width + 1))
    np.multiply(features, 1 / (scale * math.sqrt(width)), out=rows[:, :width], dtype=np.float64)
    rows[:, width] = 1
    return rows


def _cubes_within(x: np.ndarray) -> float:
    """Return the sum of the kernel over pairs of different rows; by symmetry, half of them are computed."""
    total = 0.0
    for start in range(0, len(x), TILE):
        rows = x[start : start + TILE]
        total += _cubes(rows, rows) + 2 * _cubes(rows, x[start + TILE :])
    return total - float((np.square(x).sum(axis=1) ** 3).sum())


def _cubes(x: np.ndarray, y: np.ndarray) -> float:
    """Return the sum of the kernel over all pairs, in tiles that fit the processor's cache."""
    total = 0.0
    for top in range(0, len(x), TILE):
        for left in range(0, len(y), TILE):
            inner = x[top : top + TILE] @ y[left : left + TILE].T
            total += float(np.vdot(inner * inner, inner))
    return total


def kid_with_error(real: np.ndarray, features: np.ndarray) -> tuple[float, float]:
    """Return the kernel distance between features (N, D) and real features (M, D), and its standard error.

    The error is over draws of samples from the same generator, with fixed real images. It sums a first-order term, from
    a sample's influence 2 (mean k(x, samples) - mean k(x, real)), and a second-order term, which dominates where the
    first vanishes, at equal distributions.
    """
    x, y = _with_one(features, 1.0), _with_one(real, 1.0)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return 0.0, math.inf  # of one, no kernel between different ones is known
    influence, within, square = np.empty(n), np.empty(n), 0.0
    for start in range(0, n, TILE):
        rows = x[start : start + TILE]
        kernel = (rows @ x.T) ** 3  # (b, N)
        kernel[np.arange(len(rows)), np.arange(start, start + len(rows))] = 0.0
        within[start : start + TILE] = kernel.sum(axis=1) / (n - 1)
        influence[start : start + TILE] = ((rows @ y.T) ** 3).mean(axis=1)
        square += float(np.vdot(kernel, kernel))
    among = _cubes_within(y) / (m * (m - 1))
    distance = float(within.mean() - 2 * influence.mean()) + among
    first = 4 * float(np.var(within - influence, ddof=1)) / n
    # The variance of the kernel after subtracting each sample's mean. Row means contain it divided by N, so `first`
    # counts it four times, while the variance of the distance contains it twice.
    rest = max(square / (n * (n - 1)) - 2 * float(np.square(within).mean()) + float(within.mean()) ** 2, 0.0)
    return distance, math.sqrt(max(first - 2 * rest / (n * (n - 1)), first / 2))
