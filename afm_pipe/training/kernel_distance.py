"""The kernel distance of two sets of features (KID), for the monitor and the evaluation.

Shapes: N samples, D features.
"""

import math

import numpy as np

TILE = 250  # rows, and columns, of a block of kernel values


def kid(reference: np.ndarray, features: np.ndarray, subsets: int, subset_size: int, seed: int) -> float:
    """Return the kernel distance (unbiased MMD^2, cubic kernel) of features (N, D) to reference features.

    The mean over random subsets, drawn from `seed`; equal to clean-fid's, which draws them from global random state. It
    may be negative near zero. Computed in float64, since features of a small classifier cancel badly in float32.
    """
    return float(kid_of_subsets(reference, features, subsets, subset_size, seed).mean())


def kid_of_subsets(
    reference: np.ndarray, features: np.ndarray, subsets: int, subset_size: int, seed: int, scale: float = 1.0
) -> np.ndarray:
    """Return the kernel distance of each random subset (subsets,), of features over `scale`; their mean is `kid`."""
    random = np.random.RandomState(seed % 2**32)  # clean-fid's draws, in its order
    size, values = min(len(reference), len(features), subset_size), []
    for _ in range(subsets):
        x = _with_one(features[random.choice(len(features), size, replace=False)], scale)
        y = _with_one(reference[random.choice(len(reference), size, replace=False)], scale)
        within = _cubes_within(x) + _cubes_within(y)
        values.append(within / (size * (size - 1)) - 2 * _cubes(x, y) / size**2)
    return np.array(values)


def _with_one(features: np.ndarray, scale: float) -> np.ndarray:
    """Return rows (n, D + 1) float64 whose inner products are x y / (scale^2 D) + 1, whose cube is the kernel."""
    count, width = features.shape
    rows = np.empty((count, width + 1))
    np.multiply(features, 1 / (scale * math.sqrt(width)), out=rows[:, :width], dtype=np.float64)
    rows[:, width] = 1
    return rows


def _cubes_within(x: np.ndarray) -> float:
    """Return the sum of the kernel over pairs of different rows, of which half are computed."""
    total = 0.0
    for start in range(0, len(x), TILE):
        rows = x[start : start + TILE]
        total += _cubes(rows, rows) + 2 * _cubes(rows, x[start + TILE :])
    return total - float((np.square(x).sum(axis=1) ** 3).sum())


def _cubes(x: np.ndarray, y: np.ndarray) -> float:
    """Return the sum of the kernel over all pairs, in tiles that stay in the processor's cache."""
    total = 0.0
    for top in range(0, len(x), TILE):
        for left in range(0, len(y), TILE):
            inner = x[top : top + TILE] @ y[left : left + TILE].T
            total += float(np.vdot(inner * inner, inner))
    return total
