"""Augmentations of latents: of D's inputs in guided phases, and of the guidance classifier's training data.

Each is drawn from its own random generator, so that the augmentation of a batch is a function of (seed, images seen).
"""

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from afm_pipe.data.order import ALL
from afm_pipe.params import Affine, Augmentation

ASPECT = (0.3, 3.3)  # range of an erased rectangle's aspect ratio; half of them below 1, as in kornia's RandomErasing


class Augment(Protocol):
    """An augmentation of latents."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return augmented latents (N, C, H, W)."""


class TranslateAndErase(NamedTuple):
    """Translations and erased rectangles of a batch, applied differentiably to real and generated latents alike."""

    sources: Tensor  # (N, H, W), index of the source pixel in row-major order
    keep: Tensor  # (N, H, W) bool; other pixels become zero

    def __call__(self, x: Tensor) -> Tensor:
        """Return augmented latents x (N, C, H, W)."""
        n, channels = x.shape[:2]
        index = self.sources.view(n, 1, -1).expand(n, channels, -1)
        return x.flatten(2).gather(2, index).view_as(x) * self.keep[:, None]


class Affines(NamedTuple):
    """Affine maps of a batch: rotation, translation and scaling, with reflection padding."""

    theta: Tensor  # (N, 2, 3)

    def __call__(self, x: Tensor) -> Tensor:
        """Return augmented latents x (N, C, H, W)."""
        grid = F.affine_grid(self.theta.to(x), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def draw_translate_and_erase(
    augment: Augmentation, count: int, side: int, generator: torch.Generator, shard: slice = ALL
) -> TranslateAndErase:
    """Draw translations and erased rectangles for `count` latents of H = W = `side`; return those of `shard`.

    Content moves right and down by a fraction of the side drawn from U(0, `translate`), as kornia's RandomTranslate
    does with the released range, and zeros fill the border.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")  # (H, W)
    shifts = (augment.translate * side * torch.rand(2, count, 1, 1, generator=generator)).round().long()
    shifts = shifts * (torch.rand(count, 1, 1, generator=generator) < augment.probability)
    from_rows, from_columns = rows - shifts[0], columns - shifts[1]  # (N, H, W)
    keep = (from_rows >= 0) & (from_rows < side) & (from_columns >= 0) & (from_columns < side)
    for _ in range(augment.erasings):
        keep &= ~_rectangles(augment, count, side, generator, rows, columns)
    index = from_rows.clamp(0, side - 1) * side + from_columns.clamp(0, side - 1)
    return TranslateAndErase(index[shard].contiguous(), keep[shard].contiguous())


def draw_affine(affine: Affine, count: int, generator: torch.Generator, shard: slice = ALL) -> Affines:
    """Draw rotations, translations and scalings for a batch of `count` latents; return those of `shard`."""
    angle = math.radians(affine.degrees) * (2 * torch.rand(count, generator=generator) - 1)
    shift = 2 * affine.translate * (2 * torch.rand(2, count, generator=generator) - 1)  # in half sides
    low, high = affine.scale
    scale = low + (high - low) * torch.rand(count, generator=generator)
    chosen = torch.rand(count, generator=generator) < affine.probability
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], dim=1).view(count, 2, 3)
    return Affines(torch.where(chosen[:, None, None], theta, torch.eye(2, 3))[shard])


def _rectangles(
    augment: Augmentation, count: int, side: int, generator: torch.Generator, rows: Tensor, columns: Tensor
) -> Tensor:
    """Draw a rectangle per latent to erase, as a mask (N, H, W); empty with probability 1 - `augment.probability`."""
    chosen, area, is_wide, wide, tall, top, left = torch.rand(7, count, 1, 1, generator=generator)
    low, high = augment.area
    area = (low + (high - low) * area) * side**2
    smallest, largest = ASPECT
    aspect = torch.where(is_wide < 0.5, smallest + (1 - smallest) * wide, 1 + (largest - 1) * tall)  # height / width
    height = (area * aspect).sqrt().round().clamp(1, side)
    width = (area / aspect).sqrt().round().clamp(1, side)
    top, left = (top * (side - height + 1)).floor(), (left * (side - width + 1)).floor()
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return inside & (chosen < augment.probability)
