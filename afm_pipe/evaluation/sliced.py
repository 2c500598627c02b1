"""The sliced Wasserstein distance between two sets of features, which fits no Gaussian.

Legend: N samples, M real images, D features, P directions of a block.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from afm_pipe.evaluation.frechet import Array
from afm_pipe.evaluation.intervals import stratified_error

DIRECTIONS = 1000
BLOCK = 64  # directions at a time, to bound memory


def sliced_distance(
    features: np.ndarray, labels: np.ndarray, real: np.ndarray, seed: int, directions: int = DIRECTIONS
) -> tuple[float, float]:
    """Return 3 D times the mean squared 1-D Wasserstein distance over random directions, and its standard error.

    `features` (N, D) of classes `labels` (N,) are those of samples, `real` (M, D) of real images; N and M may differ.
    In Inception's features it is the Monge Inception Distance (Berthet et al. 2026, arXiv 2605.06797). Directions are
    drawn from `seed`, orthogonal in blocks of up to D. The error is over the draw of samples, to first order: sample x
    contributes the Kantorovich potential of its projections.
    """
    count, dim = features.shape
    rank, other, weight = _coupling(count, len(real))
    total, potentials = 0.0, np.zeros(count)
    for block in _directions(dim, directions, seed):
        x, y = (np.asarray(each @ block, dtype=np.float64).T for each in (features, real))  # (P, N), (P, M)
        order = x.argsort(axis=1)
        x, y = np.take_along_axis(x, order, axis=1), np.sort(y, axis=1)
        total += float((np.square(x[:, rank] - y[:, other]) @ weight).sum())
        # The potential's slope at x is 2 (x - T(x)), with T(x) the mean of the real values that x is matched with.
        starts = np.flatnonzero(np.diff(rank, prepend=-1))
        matched = np.add.reduceat(y[:, other] * weight, starts, axis=1) * count
        slope = 2 * (x - matched)
        steps = (slope[:, 1:] + slope[:, :-1]) / 2 * np.diff(x, axis=1)
        potential = np.concatenate([np.zeros((len(x), 1)), steps.cumsum(axis=1)], axis=1)
        potential -= potential.mean(axis=1, keepdims=True)
        np.add.at(potentials, order.ravel(), potential.ravel())
    scale = 3 * dim / directions
    return scale * total, scale * stratified_error(potentials, labels)


def _coupling(count: int, others: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Return which of `count` sorted values meets which of `others`, and with what weight: the optimal 1-D coupling."""
    ends = np.unique(np.concatenate([np.arange(1, count + 1) * others, np.arange(1, others + 1) * count]))
    starts = np.concatenate([[0], ends[:-1]])  # in units of 1 / (count others), exact
    return starts // others, starts // count, (ends - starts) / (count * others)


def _directions(dim: int, number: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """Yield blocks of random unit vectors (D, P), `number` in all; those of a basis of up to D are orthogonal."""
    random, left = np.random.default_rng(seed), number
    while left:
        basis = np.linalg.qr(random.normal(size=(dim, min(dim, left))))[0].astype(np.float32)
        left -= basis.shape[1]
        for start in range(0, basis.shape[1], BLOCK):
            yield basis[:, start : start + BLOCK]
