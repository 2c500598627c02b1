"""Write samples batch by batch: as a grid, as numbered PNG files, or as one npz.

A writer takes batches (B, C, H, W) uint8 on the CPU in index order; `finish` follows the last one.
"""

import math
import os
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Lay out uint8 images (N, C, H, W) row by row on white, `gap` pixels apart; C is 1 or 3."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    shape = 1, channels, rows * (height + gap) + gap, columns * (width + gap) + gap
    sheet = torch.full(shape, 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[0, :, top : top + height, left : left + width] = image
    pixels = _pixels(sheet)[0]  # (rows, columns, C)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


class ImageWriter(Protocol):
    """Writes images to files."""

    def add(self, images: Tensor) -> None:
        """Add the next images."""

    def finish(self) -> None:
        """Write everything that is not written yet."""


class GridWriter:
    """One picture, row by row; keeps all images in memory until it is written."""

    def __init__(self, path: Path, columns: int) -> None:
        self.path, self.columns, self.batches = path, columns, list[Tensor]()

    def add(self, images: Tensor) -> None:
        self.batches.append(images)

    def finish(self) -> None:
        grid(torch.cat(self.batches), self.columns).save(self.path, format="png")


class PngWriter:
    """000000.png, 000001.png, ... in a new folder."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path, self.count = path, 0

    def add(self, images: Tensor) -> None:
        for image in images:
            grid(image[None], columns=1, gap=0).save(self.path / f"{self.count:06d}.png")
            self.count += 1

    def finish(self) -> None:
        pass


class NpzWriter:
    """One npz file: arr_0 (N, H, W, C) uint8 and labels (N,) int64. The same images give the same bytes.

    With a `shuffle_seed` the file suits ADM's evaluator: RGB, labels as arr_1, and in random order, because the
    evaluator averages its Inception Score over consecutive parts. A temporary file beside `path` holds the images, so
    that they are never all in memory.
    """

    def __init__(self, path: Path, labels: Tensor, shuffle_seed: int | None = None) -> None:
        self.path, self.shuffled, self.added = path, shuffle_seed is not None, 0
        order = np.arange(len(labels))  # row of the file -> sample
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(len(labels))
        self.labels, self.rows = labels.numpy()[order], order.argsort()  # sample -> row of the file
        self.images: np.memmap | None = None

    def add(self, images: Tensor) -> None:
        pixels = _pixels(images)
        if self.shuffled and pixels.shape[-1] == 1:
            pixels = pixels.repeat(3, axis=-1)
        if self.images is None:
            shape = len(self.rows), *pixels.shape[1:]
            with tempfile.TemporaryFile(dir=self.path.parent) as file:  # the memory map keeps it alive
                file.truncate(math.prod(shape))
                if hasattr(os, "posix_fallocate"):  # not on macOS; a full disk is an error here instead of SIGBUS later
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape))
                self.images = np.memmap(file, np.uint8, "r+", shape=shape)
        self.images[self.rows[self.added : self.added + len(pixels)]] = pixels
        self.added += len(pixels)

    def finish(self) -> None:
        assert self.images is not None and self.added == len(self.rows), "all images were added"
        with self.path.open("wb") as file:
            if self.shuffled:
                np.savez(file, arr_0=self.images, arr_1=self.labels)
            else:
                np.savez(file, arr_0=self.images, labels=self.labels)


def _pixels(images: Tensor) -> np.ndarray:
    """Return images (N, C, H, W) as (N, H, W, C)."""
    return images.permute(0, 2, 3, 1).numpy()
