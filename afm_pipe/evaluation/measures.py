"""Inception Score, variance within classes, PSNR, and the scale of features.

Legend: N samples, D features, K classes; C, H, W channels, height and width of images.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from afm_pipe.runtime.errors import UserError

SCORE_PART = 5000  # samples of one Inception Score


def inception_score(features: np.ndarray, probabilities: Callable[[np.ndarray], np.ndarray], seed: int) -> float:
    """Return the Inception Score of features (N, D): exp of the mean KL divergence of p(class | x) from its mean.

    `probabilities` maps features (n, D) to class probabilities (n, K). The score is a mean over parts of 5,000, as in
    ADM's evaluator. A permutation drawn from `seed` forms the parts, because parts sorted by class score differently.
    """
    parts = max(len(features) // SCORE_PART, 1)
    scores = []
    for chosen in np.array_split(np.random.default_rng(seed).permutation(len(features)), parts):
        p = probabilities(features[chosen]).astype(np.float64)
        tiny = np.finfo(np.float64).tiny
        divergence = (p * (np.log(p.clip(min=tiny)) - np.log(p.mean(axis=0).clip(min=tiny)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def root_mean_square(features: np.ndarray) -> float:
    """Return the root mean square of features (N, D), without a float64 copy of them."""
    total = sum(float(np.square(features[i : i + 1024], dtype=np.float64).sum()) for i in range(0, len(features), 1024))
    return math.sqrt(total / features.size)


def within_class_variance(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the trace of the covariance of features (N, D) within a class, averaged over classes.

    Classes with one sample are ignored. Raises UserError if no class has two.
    """
    traces = []
    for label in np.unique(labels):
        members = features[labels == label]
        if len(members) > 1:
            traces.append(members.var(axis=0, ddof=1, dtype=np.float64).sum())
    if not traces:
        raise UserError(
            f"Found {len(labels)} images, all of different classes, expected two images in some class: add images."
        )
    return float(np.mean(traces))


def squared_errors(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Return the mean squared difference (N,) float64, in units of 1/255, of images (N, C, H, W) uint8 each."""
    return (images.double() - rebuilt.double()).square().mean(dim=(1, 2, 3))


def psnr(errors: Tensor) -> tuple[float | None, float | None]:
    """Return PSNR in dB of squared errors (N,): the mean over images, and that of the mean squared error.

    The second is lower, since the worst images weigh most. None stands for an infinite one: an error of 0.
    """

    def decibels(error: Tensor) -> float | None:
        value = float((10 * (255**2 / error).log10()).mean())
        return value if math.isfinite(value) else None

    return decibels(errors), decibels(errors.mean())


class ClassSpread:
    """`within_class_variance` of a stream of samples, from sums alone."""

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64)
        self.sums: Tensor | None = None  # (K, D)
        self.squares = torch.zeros(num_classes, dtype=torch.float64)

    def add(self, samples: Tensor, labels: Tensor) -> None:
        """Add samples (N, ...) of classes `labels` (N,)."""
        flat = samples.flatten(1).double()  # (N, D)
        if self.sums is None:
            self.sums = torch.zeros(len(self.counts), flat.shape[1], dtype=torch.float64)
        self.sums.index_add_(0, labels, flat)
        self.squares.index_add_(0, labels, flat.square().sum(1))
        self.counts.index_add_(0, labels, torch.ones(len(flat), dtype=torch.float64))

    def variance(self) -> float:
        """Return the variance."""
        assert self.sums is not None, "no samples were added"
        several = self.counts > 1
        counts, sums, squares = self.counts[several], self.sums[several], self.squares[several]
        return float(((squares - sums.square().sum(1) / counts) / (counts - 1)).mean())


def spread_evenly(count: int, maximum: int) -> np.ndarray:
    """Return at most `maximum` of `count` indices, evenly spaced: equal shares of the classes of sorted data."""
    chosen = min(count, maximum)
    return np.arange(chosen) * count // chosen


def sample_suffix(samples: int) -> str:
    """Return the suffix of a metric's key: none for 50,000 samples or more, else _5k or _1234."""
    if samples >= 50_000:
        return ""
    return f"_{samples // 1000}k" if samples % 1000 == 0 else f"_{samples}"
