"""Thumbnails of training images, and the nearest ones to a sample, which reveal a generator that copies.

Legend: T training thumbnails, N images, C channels, h x w pixels, at most 32 x 32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afm_pipe.evaluation.arrays import load_arrays
from afm_pipe.runtime.errors import UserError

SIDE = 32  # pixels of a thumbnail, at most
COPY_QUANTILE = 0.001  # fraction of new real images that count as copies
ROWS = 1024  # images compared at a time, to bound memory


@dataclass(frozen=True)
class Thumbnails:
    """Small training images (T, C, h, w) uint8 and their labels (T,).

    `nearest_other` (T,) is the distance to the nearest other thumbnail, `ratio` (T,) that over the second nearest.
    """

    images: Tensor
    labels: np.ndarray
    nearest_other: np.ndarray
    ratio: np.ndarray

    def save(self, path: Path) -> None:
        """Write an npz file."""
        np.savez(path, **(vars(self) | {"images": self.images.numpy()}))

    @classmethod
    def load(cls, path: Path) -> "Thumbnails":
        """Read a file that `save` wrote. Raises UserError if it is missing or unreadable."""
        arrays = load_arrays(path, tuple(cls.__dataclass_fields__))
        images, count = arrays.pop("images"), len(arrays["labels"]) if arrays["labels"].ndim else -1
        kinds = [images.dtype.kind, *(array.dtype.kind for array in arrays.values())]
        if images.ndim != 4 or kinds != ["u", "i", "f", "f"] or any(a.shape != (count,) for a in arrays.values()):
            count = -1
        if len(images) != count or images.dtype != np.uint8:
            raise UserError(
                f"Found {path} with arrays that do not match, expected images (T, C, h, w) uint8 with a label and two "
                "distances each: build the reference again."
            )
        return cls(torch.from_numpy(images), **arrays)

    @property
    def copy_ratio(self) -> float:
        """The `ratio` below which one training image in a thousand lies, duplicates excluded."""
        distinct = self.ratio[self.ratio > 0]
        return float(np.quantile(distinct, COPY_QUANTILE)) if len(distinct) else 0.0

    def median_nearest_other(self, class_counts: Sequence[int]) -> float:
        """Return the median of `nearest_other` over images in these class shares.

        Thumbnails are as many of each class as its images allow; with unequal shares each counts for its class's share.
        """
        if len(set(class_counts)) == 1:
            return float(np.median(self.nearest_other))
        of_class = np.bincount(self.labels, minlength=len(class_counts))
        order = np.argsort(self.nearest_other, kind="stable")
        labels = self.labels[order]
        below = np.cumsum(np.asarray(class_counts)[labels] / of_class[labels])
        return float(self.nearest_other[order[np.searchsorted(below, below[-1] / 2)]])

    def copied(self, distances: Tensor) -> np.ndarray:
        """Return which images are copies (N,) bool, by distances (N, 2 or more) to their nearest training images.

        A copy is much closer to one training image than to the next. The distance alone does not tell: simple images
        (a vertical stroke) are close to each other, and the autoencoder's reconstruction of a complex image is far from
        it. An inexact copy of an image that the data set contains twice is missed.
        """
        return ratios(distances).numpy() <= self.copy_ratio


def thumbnail(images: Tensor) -> Tensor:
    """Shrink uint8 images (N, C, H, W) to at most 32 x 32 by averaging; smaller ones are unchanged."""
    height, width = images.shape[2:]
    if max(height, width) <= SIDE:
        return images
    scale = SIDE / max(height, width)
    small = F.interpolate(images.float(), (round(height * scale), round(width * scale)), mode="area")
    return small.round().to(torch.uint8)


def build_thumbnails(images: Tensor, labels: np.ndarray) -> Thumbnails:
    """Measure the distances between thumbnails. Raises UserError for fewer than three."""
    if len(images) < 3:
        raise UserError(f"Found {len(images)} thumbnails, expected at least 3: raise reference.thumbnails.")
    distances, neighbors = Neighbors(images).nearest(images, 3)
    itself = neighbors == torch.arange(len(images))[:, None]
    others = distances.masked_fill(itself, torch.inf).sort(dim=1).values[:, :2]  # (T, 2)
    return Thumbnails(images, labels, others[:, 0].numpy(), ratios(others).numpy())


def ratios(distances: Tensor) -> Tensor:
    """Return the smallest over the second smallest of sorted distances (N, 2 or more): (N,), 0 for an exact copy."""
    return distances[:, 0] / distances[:, 1].clamp(min=torch.finfo(distances.dtype).tiny)


class Neighbors:
    """Nearest-neighbor search among training images (T, C, h, w) uint8: Euclidean distance of pixels in [0, 1]."""

    def __init__(self, training: Tensor) -> None:
        self._training = training.flatten(1).float() / 255  # (T, P)
        self._squares = self._training.square().sum(dim=1)  # (T,)

    def nearest(self, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return distances (N, k) and indices (N, k) of the k training images nearest to each image, in order."""
        distances, indices = [], []
        for chunk in images.split(ROWS):
            x = chunk.flatten(1).float() / 255  # (b, P)
            rough = self._squares - 2 * x @ self._training.T  # (b, T); |x|^2 does not change the order
            found = rough.topk(min(k, len(self._training)), dim=1, largest=False).indices  # (b, k)
            exact = (x[:, None] - self._training[found]).square().sum(dim=2).sqrt()  # (b, k); exactly 0 for a copy
            order = exact.argsort(dim=1, stable=True)
            distances.append(exact.gather(1, order))
            indices.append(found.gather(1, order))
        return torch.cat(distances), torch.cat(indices)
