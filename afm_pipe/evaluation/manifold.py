"""Precision and recall: how many samples lie among the real images, and how many real images among the samples.

Shapes: N samples, M real images, D features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from afm_pipe.runtime.errors import UserError

NEIGHBORS = 3  # k of Kynkaanniemi et al. 2019
MAX_REAL = 10_000  # real images, as in ADM's reference batch
TILE = (128, 2048)  # rows and columns of distances held at a time: they stay in the processor's cache
CPU = torch.device("cpu")


class PrecisionRecall(NamedTuple):
    """Samples within a real image's ball of N, and real images within a sample's ball of M."""

    samples_within: int
    samples: int
    real_within: int
    real: int


def precision_recall(real: np.ndarray, samples: np.ndarray, device: torch.device = CPU) -> PrecisionRecall:
    """Count by the improved precision and recall of Kynkaanniemi et al. (2019) on features (M, D) and (N, D).

    A ball reaches from each point of a set to its third nearest other one. Distances are float64, a tile of them at a
    time, and so are features. Raises UserError for fewer than four points of a set.
    """
    for what, found in (("samples", samples), ("real images", real)):
        if len(found) <= NEIGHBORS:
            raise UserError(f"Found {len(found)} {what}, expected more than {NEIGHBORS} for precision and recall.")
    centre = torch.from_numpy(real.mean(axis=0, dtype=np.float64))  # distances cancel less around it
    x, y = _Points(samples, centre, device), _Points(real, centre, device)
    return PrecisionRecall(*_within(x, y, _radii(x), _radii(y)))


class _Points:
    """Features (n, D) around a centre, some of them in float64 at a time."""

    def __init__(self, features: np.ndarray, centre: Tensor, device: torch.device) -> None:
        self._features, self._centre, self.device = torch.from_numpy(features), centre, device

    def __len__(self) -> int:
        return len(self._features)

    def part(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return some of the points (b, D) and their squared lengths (b,)."""
        points = (self._features[start : start + size].double() - self._centre).to(self.device)
        return points, points.square().sum(dim=1)


def _radii(points: _Points) -> Tensor:
    """Return the squared distance of each point to its third nearest other (n,)."""
    nearest = torch.full((len(points), NEIGHBORS + 1), torch.inf, dtype=torch.float64, device=points.device)
    for top, left, squared in _tiles(points, points):
        last = min(top + squared.shape[0], left + squared.shape[1])
        own = torch.arange(max(top, left), max(top, left, last), device=points.device)
        squared[own - top, own - left] = -1.0  # itself first, whatever rounding says
        found = squared.topk(min(NEIGHBORS + 1, squared.shape[1]), dim=1, largest=False).values
        rows = nearest[top : top + len(squared)]
        rows[:] = torch.cat([rows, found], dim=1).topk(NEIGHBORS + 1, dim=1, largest=False).values
    return nearest.amax(dim=1)


def _within(x: _Points, y: _Points, x_radii: Tensor, y_radii: Tensor) -> tuple[int, int, int, int]:
    """Count the points of each set within a ball of the other, and the points."""
    of_x, of_y = (torch.zeros(len(each), dtype=torch.bool, device=each.device) for each in (x, y))
    for top, left, squared in _tiles(x, y):
        rows, columns = slice(top, top + squared.shape[0]), slice(left, left + squared.shape[1])
        of_x[rows] |= (squared <= y_radii[columns]).any(dim=1)
        of_y[columns] |= (squared <= x_radii[rows, None]).any(dim=0)
    return int(of_x.sum()), len(x), int(of_y.sum()), len(y)


def _tiles(a: _Points, b: _Points) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the first row, the first column and the squared distances of some of `a` to some of `b`."""
    height, width = TILE
    for left in range(0, len(b), width):
        columns, column_squares = b.part(left, width)
        for top in range(0, len(a), height):
            rows, row_squares = a.part(top, height)
            squares = column_squares + row_squares[:, None]
            yield top, left, squares.addmm_(rows, columns.T, alpha=-2).clamp_(min=0)
