"""Nearest training images, in pixels: what shows a generator that copies.

Shapes: T training thumbnails, B images, C channels, h x w pixels, at most 32 x 32.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afm_pipe.runtime.errors import UserError

SIDE = 32  # pixels of a thumbnail, at most
COPY_QUANTILE = 0.001  # share of new real images that would be taken for copies
INFLATED, LARGEST_RATIO = 1 << 26, 20  # an entry may take so many bytes, and so many times its own, of memory
ROWS = 1024  # images compared at a time, to bound memory


@dataclass(frozen=True)
class Thumbnails:
    """Small training images (T, C, h, w) uint8, their labels (T,), and how near the others are.

    `nearest_other` (T,) is the distance of each to its nearest other, `ratio` (T,) that over its second nearest.
    """

    images: Tensor
    labels: np.ndarray
    nearest_other: np.ndarray
    ratio: np.ndarray

    def save(self, path: Path) -> None:
        """Write them as npz."""
        np.savez(path, **(vars(self) | {"images": self.images.numpy()}))

    @classmethod
    def load(cls, path: Path) -> "Thumbnails":
        """Read what `save` wrote. Raises UserError when it is missing or unreadable."""
        arrays = load_arrays(path, tuple(cls.__dataclass_fields__))
        images, count = arrays.pop("images"), len(arrays["labels"]) if arrays["labels"].ndim else -1
        kinds = [images.dtype.kind, *(array.dtype.kind for array in arrays.values())]
        if images.ndim != 4 or kinds != ["u", "i", "f", "f"] or any(a.shape != (count,) for a in arrays.values()):
            count = -1
        if len(images) != count or images.dtype != np.uint8:
            raise UserError(
                f"Found {path} with arrays that do not belong together, expected images (T, C, h, w) uint8 with a "
                "label and two distances each: build the reference again."
            )
        return cls(torch.from_numpy(images), **arrays)

    @property
    def copy_ratio(self) -> float:
        """Ratio, nearest to second nearest, that one training image in a thousand falls below; duplicates left out."""
        distinct = self.ratio[self.ratio > 0]
        return float(np.quantile(distinct, COPY_QUANTILE)) if len(distinct) else 0.0

    def copied(self, distances: Tensor) -> np.ndarray:
        """Tell which images, by distances (B, 2 or more) to their nearest training images, are copies: (B,) bool.

        A copy is far nearer to one training image than to the next. A distance alone does not tell: plain images (a
        vertical stroke) lie close together, and a copy of an intricate one through the autoencoder is further off.
        An inexact copy of an image that is in the data set twice is missed.
        """
        return ratios(distances).numpy() <= self.copy_ratio


def load_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read named arrays of an npz file, without pickles. Raises UserError when it is missing or unreadable."""
    try:
        with ZipFile(path) as archive:
            for name in names:
                _check_array(archive, f"{name}.npy")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise UserError(f"Found no {path}, expected statistics of the real images: build the reference.") from None
    except Exception as error:  # whatever numpy and zipfile make of damaged or hostile bytes
        raise UserError(
            f"Found {path} unreadable ({error}), expected arrays {', '.join(names)}: build the reference again."
        ) from None


def _check_array(archive: ZipFile, name: str) -> None:
    """Raise ValueError for an array larger than its entry, or an entry far larger than the bytes it takes."""
    entry = archive.getinfo(name)
    if entry.file_size > INFLATED + LARGEST_RATIO * entry.compress_size:
        raise ValueError(f"{name} of {entry.compress_size:,} bytes would become {entry.file_size:,}")
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(f"{name} says it is {dtype} of shape {shape}, in {entry.file_size:,} bytes")


def thumbnail(images: Tensor) -> Tensor:
    """Shrink uint8 images (B, C, H, W) to at most 32 x 32 by averaging; smaller ones stay as they are."""
    height, width = images.shape[2:]
    if max(height, width) <= SIDE:
        return images
    scale = SIDE / max(height, width)
    small = F.interpolate(images.float(), (round(height * scale), round(width * scale)), mode="area")
    return small.round().to(torch.uint8)


def build_thumbnails(images: Tensor, labels: np.ndarray) -> Thumbnails:
    """Measure how near each thumbnail's others are. Raises UserError for fewer than three."""
    if len(images) < 3:
        raise UserError(f"Found {len(images)} thumbnails, expected at least 3 to compare: raise reference.thumbnails.")
    distances, neighbors = Neighbors(images).nearest(images, 3)
    itself = neighbors == torch.arange(len(images))[:, None]
    others = distances.masked_fill(itself, torch.inf).sort(dim=1).values[:, :2]  # (T, 2)
    return Thumbnails(images, labels, others[:, 0].numpy(), ratios(others).numpy())


def ratios(distances: Tensor) -> Tensor:
    """Return the smallest over the second smallest of sorted distances (B, 2 or more): (B,), 0 for an exact copy."""
    return distances[:, 0] / distances[:, 1].clamp(min=torch.finfo(distances.dtype).tiny)


class Neighbors:
    """Search among training images (T, C, h, w) uint8 for those nearest to others, in Euclidean distance.

    Pixels count from 0 to 1.
    """

    def __init__(self, training: Tensor) -> None:
        self._training = training.flatten(1).float() / 255  # (T, P)
        self._squares = self._training.square().sum(dim=1)  # (T,)

    def nearest(self, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return distances (B, k) and indices (B, k) of the k training images nearest to each image, nearest first."""
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
