"""Measures on features besides the Frechet distance.

Shapes: N samples, D features.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from afm_pipe.runtime.errors import UserError

SCORE_PART = 5000  # samples of an Inception Score


def inception_score(features: np.ndarray, probabilities: Callable[[np.ndarray], np.ndarray], seed: int) -> float:
    """Return the Inception Score of features (N, D): exp of the mean divergence of their classes from the mean.

    `probabilities` maps some of them (n, D) to class probabilities (n, K). The mean over parts of 5,000, as ADM's
    evaluator takes it; the parts are of a permutation drawn from `seed`, since samples in the order of their classes
    would give another score. Fewer than 5,000 are one part.
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
    """Return the size of features (N, D), in float64 without a copy of them in it."""
    total = sum(float(np.square(features[i : i + 1024], dtype=np.float64).sum()) for i in range(0, len(features), 1024))
    return math.sqrt(total / features.size)


def within_class_variance(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the trace of the covariance of features (N, D) within a class, averaged over classes.

    Classes of one sample have none and are left out. Raises UserError when no class has two.
    """
    traces = []
    for label in np.unique(labels):
        members = features[labels == label]
        if len(members) > 1:
            traces.append(members.var(axis=0, ddof=1, dtype=np.float64).sum())
    if not traces:
        raise UserError(f"Found {len(labels)} images, each of another class, expected two of some class: add images.")
    return float(np.mean(traces))


class ClassSpread:
    """Within-class variance, as `within_class_variance`, of more samples than memory holds: sums alone are kept."""

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64)
        self.sums: Tensor | None = None  # (K, D)
        self.squares = torch.zeros(num_classes, dtype=torch.float64)

    def add(self, samples: Tensor, labels: Tensor) -> None:
        """Take in samples (B, ...) of classes `labels` (B,)."""
        flat = samples.flatten(1).double()  # (B, D)
        if self.sums is None:
            self.sums = torch.zeros(len(self.counts), flat.shape[1], dtype=torch.float64)
        self.sums.index_add_(0, labels, flat)
        self.squares.index_add_(0, labels, flat.square().sum(1))
        self.counts.index_add_(0, labels, torch.ones(len(flat), dtype=torch.float64))

    def variance(self) -> float:
        """Return the trace of the covariance within a class, averaged over the classes of two samples or more."""
        assert self.sums is not None, "no samples were added"
        some = self.counts > 1
        counts, sums, squares = self.counts[some], self.sums[some], self.squares[some]
        return float(((squares - sums.square().sum(1) / counts) / (counts - 1)).mean())


def sample_suffix(samples: int) -> str:
    """Return what a key says of its sample count: nothing from 50,000, else _5k or _1234."""
    if samples >= 50_000:
        return ""
    return f"_{samples // 1000}k" if samples % 1000 == 0 else f"_{samples}"
