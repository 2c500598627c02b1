"""Augmentation of latents: of what D sees in guided phases, and of what the classifier is trained on.

Each is drawn from a separate generator, so that a batch's augmentation is a function of (seed, images seen).
"""

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from afm_pipe.data.order import ALL
from afm_pipe.params import Affine, Augmentation

ASPECT = (0.3, 3.3)  # of an erased rectangle: half of the draws below 1, half above, as kornia's RandomErasing draws


class View(Protocol):
    """An augmentation of latents."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return augmented latents (N, C, H, W)."""


class AugmentedView(NamedTuple):
    """Translations and erasings of a batch, applied differentiably, to real and fake alike."""

    origins: Tensor  # (N, H, W): the index of the source pixel, row by row
    keep: Tensor  # (N, H, W) bool; the others are zero

    def __call__(self, x: Tensor) -> Tensor:
        """Return augmented latents x (N, C, H, W)."""
        n, channels = x.shape[:2]
        where = self.origins.to(x.device).view(n, 1, -1).expand(n, channels, -1)
        return x.flatten(2).gather(2, where).view_as(x) * self.keep.to(x.device)[:, None]


class AffineView(NamedTuple):
    """Rotations, translations and magnifications of a batch, with reflection at the border."""

    theta: Tensor  # (N, 2, 3)

    def __call__(self, x: Tensor) -> Tensor:
        """Return augmented latents x (N, C, H, W)."""
        grid = F.affine_grid(self.theta.to(x), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def augmented_view(
    augment: Augmentation, count: int, side: int, generator: torch.Generator, own: slice = ALL
) -> AugmentedView:
    """Draw translations and erasings for a batch of latents (N, C, H, W) with N = `count`, H = W = `side`.

    Content moves right and down by a share of the side drawn from U(0, `translate`), as kornia's RandomTranslate does
    with the released range; zeros move in, and erased rectangles are zero. `own` says which of the batch are wanted.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")  # (H, W)
    moves = (augment.translate * side * torch.rand(2, count, 1, 1, generator=generator)).round().long()
    moves = moves * (torch.rand(count, 1, 1, generator=generator) < augment.probability)
    from_rows, from_columns = rows - moves[0], columns - moves[1]  # (N, H, W)
    keep = (from_rows >= 0) & (from_rows < side) & (from_columns >= 0) & (from_columns < side)
    for _ in range(augment.erasings):
        keep &= ~_rectangles(augment, count, side, generator, rows, columns)
    index = from_rows.clamp(0, side - 1) * side + from_columns.clamp(0, side - 1)
    return AugmentedView(index[own].contiguous(), keep[own].contiguous())


def affine_view(affine: Affine, count: int, generator: torch.Generator, shard: slice = ALL) -> AffineView:
    """Draw rotations, translations and magnifications for a batch of `count` latents; return those of `shard`."""
    angle = math.radians(affine.degrees) * (2 * torch.rand(count, generator=generator) - 1)
    shift = 2 * affine.translate * (2 * torch.rand(2, count, generator=generator) - 1)  # in half sides
    low, high = affine.scale
    scale = low + (high - low) * torch.rand(count, generator=generator)
    chosen = torch.rand(count, generator=generator) < affine.probability
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], dim=1).view(count, 2, 3)
    return AffineView(torch.where(chosen[:, None, None], theta, torch.eye(2, 3))[shard])


def _rectangles(
    augment: Augmentation, count: int, side: int, generator: torch.Generator, rows: Tensor, columns: Tensor
) -> Tensor:
    """Draw a rectangle per latent as a mask (N, H, W); empty where the draw leaves the latent alone."""
    chosen, area, wide, narrow, tall, top, left = torch.rand(7, count, 1, 1, generator=generator)
    low, high = augment.area
    area = (low + (high - low) * area) * side**2
    flat, steep = ASPECT
    aspect = torch.where(wide < 0.5, flat + (1 - flat) * narrow, 1 + (steep - 1) * tall)  # height over width
    height = (area * aspect).sqrt().round().clamp(1, side)
    width = (area / aspect).sqrt().round().clamp(1, side)
    top, left = (top * (side - height + 1)).floor(), (left * (side - width + 1)).floor()
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return inside & (chosen < augment.probability)
