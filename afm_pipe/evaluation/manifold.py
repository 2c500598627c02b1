"""Precision and recall: how many samples lie among the real images, and how many real images among the samples.

Shapes: N samples, M real images, D features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from afm_pipe.errors import UserError

NEIGHBOURS = 3  # k of Kynkaanniemi et al. 2019
MAX_REAL = 10_000  # real images, as in ADM's reference batch
BLOCK = 1 << 24  # distances held at a time
CPU = torch.device("cpu")


class PrecisionRecall(NamedTuple):
    """Samples within a real image's ball of N, and real images within a sample's ball of M."""

    samples_within: int
    samples: int
    real_within: int
    real: int


def precision_recall(real: np.ndarray, samples: np.ndarray, device: torch.device = CPU) -> PrecisionRecall:
    """Count by the improved precision and recall of Kynkaanniemi et al. (2019) on features (M, D) and (N, D).

    A ball reaches from each point of a set to its third nearest other one. Distances are float64, a block of them at a
    time. Raises UserError for fewer than four points of a set.
    """
    for what, found in (("samples", samples), ("real images", real)):
        if len(found) <= NEIGHBOURS:
            raise UserError(f"Found {len(found)} {what}, expected more than {NEIGHBOURS} for precision and recall.")
    centre = real.mean(axis=0, dtype=np.float64)  # distances cancel less around it
    x, y = (torch.from_numpy(each.astype(np.float64) - centre).to(device) for each in (samples, real))
    within = _within(x, y, _radii(y)), _within(y, x, _radii(x))
    return PrecisionRecall(within[0], len(x), within[1], len(y))


def _radii(points: Tensor) -> Tensor:
    """Return the squared distance of each point to its third nearest other (n,)."""
    found = []
    for start, squared in _blocks(points, points):
        rows = torch.arange(len(squared), device=points.device)
        squared[rows, rows + start] = -1.0  # itself first, whatever rounding says
        found.append(squared.topk(NEIGHBOURS + 1, dim=1, largest=False).values[:, -1])
    return torch.cat(found)


def _within(points: Tensor, centres: Tensor, radii: Tensor) -> int:
    return sum(int((squared <= radii).any(dim=1).sum()) for _, squared in _blocks(points, centres))


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the squared distances of a block of rows of `a` to all of `b`."""
    squares, size = b.square().sum(dim=1), max(BLOCK // len(b), 1)
    for start in range(0, len(a), size):
        rows = a[start : start + size]
        yield start, torch.addmm(squares + rows.square().sum(dim=1, keepdim=True), rows, b.T, alpha=-2).clamp_(min=0)
