"""Improved precision and recall (Kynkaanniemi et al. 2019).

Precision is the fraction of samples that lie on the manifold of the real images, recall the converse.

Legend: N samples, M real images, D features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from afm_pipe.runtime.errors import UserError

NEIGHBORS = 3  # k
MAX_REAL = 10_000  # real images, as in ADM's reference batch
TILE = (128, 2048)  # rows and columns of distances computed at a time: they fit the processor's cache
CPU = torch.device("cpu")


class PrecisionRecall(NamedTuple):
    """Counts: samples within a ball of a real image, of N samples; real images within a ball of a sample, of M."""

    samples_within: int
    samples: int
    real_within: int
    real: int


def precision_recall(real: np.ndarray, samples: np.ndarray, device: torch.device = CPU) -> PrecisionRecall:
    """Count samples within balls of real images, and the reverse, on features (M, D) and (N, D).

    A ball reaches from a point to its third nearest neighbor in the same set. Distances are float64, a tile at a time.
    Raises UserError for fewer than four points in a set.
    """
    for what, found in (("samples", samples), ("real images", real)):
        if len(found) <= NEIGHBORS:
            raise UserError(f"Found {len(found)} {what}, expected more than {NEIGHBORS} for precision and recall.")
    center = torch.from_numpy(real.mean(axis=0, dtype=np.float64))  # centered distances lose fewer digits
    x, y = _Points(samples, center, device), _Points(real, center, device)
    return PrecisionRecall(*_within(x, y, _radii(x), _radii(y)))


class _Points:
    """Centered features (n, D), converted to float64 in parts."""

    def __init__(self, features: np.ndarray, center: Tensor, device: torch.device) -> None:
        self._features, self._center, self.device = torch.from_numpy(features), center, device

    def __len__(self) -> int:
        return len(self._features)

    def part(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return a range of points (b, D) and their squared norms (b,)."""
        points = (self._features[start : start + size].double() - self._center).to(self.device)
        return points, points.square().sum(dim=1)


def _radii(points: _Points) -> Tensor:
    """Return the squared distance of each point to its third nearest neighbor (n,)."""
    nearest = torch.full((len(points), NEIGHBORS + 1), torch.inf, dtype=torch.float64, device=points.device)
    for top, left, squared in _tiles(points, points):
        last = min(top + squared.shape[0], left + squared.shape[1])
        own = torch.arange(max(top, left), max(top, left, last), device=points.device)
        squared[own - top, own - left] = -1.0  # the point itself sorts first, whatever the rounding
        found = squared.topk(min(NEIGHBORS + 1, squared.shape[1]), dim=1, largest=False).values
        rows = nearest[top : top + len(squared)]
        rows[:] = torch.cat([rows, found], dim=1).topk(NEIGHBORS + 1, dim=1, largest=False).values
    return nearest.amax(dim=1)


def _within(x: _Points, y: _Points, x_radii: Tensor, y_radii: Tensor) -> tuple[int, int, int, int]:
    """Count the points of each set within a ball of the other; each count is followed by the size of its set."""
    of_x, of_y = (torch.zeros(len(each), dtype=torch.bool, device=each.device) for each in (x, y))
    for top, left, squared in _tiles(x, y):
        rows, columns = slice(top, top + squared.shape[0]), slice(left, left + squared.shape[1])
        of_x[rows] |= (squared <= y_radii[columns]).any(dim=1)
        of_y[columns] |= (squared <= x_radii[rows, None]).any(dim=0)
    return int(of_x.sum()), len(x), int(of_y.sum()), len(y)


def _tiles(a: _Points, b: _Points) -> Iterator[tuple[int, int, Tensor]]:
    """Yield tiles of squared distances from `a` to `b`: first row, first column, distances."""
    height, width = TILE
    for left in range(0, len(b), width):
        columns, column_squares = b.part(left, width)
        for top in range(0, len(a), height):
            rows, row_squares = a.part(top, height)
            squares = column_squares + row_squares[:, None]
            yield top, left, squares.addmm_(rows, columns.T, alpha=-2).clamp_(min=0)
