"""Where samples go, batch by batch: a grid, numbered PNG files, or one npz.

Each is given batches (B, C, H, W) uint8 on the CPU in the order of their indices, and is finished after the last.
"""

import zipfile
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, cat

from afm_pipe.sampling import grid


class ImageFile(Protocol):
    """What images are added to."""

    def add(self, images: Tensor) -> None:
        """Take the next images."""

    def finish(self) -> None:
        """Write what is left to write, once all images were added."""


class GridFile:
    """One picture, row by row; it holds all images until it is finished."""

    def __init__(self, path: Path, columns: int) -> None:
        self.path, self.columns, self.batches = path, columns, list[Tensor]()

    def add(self, images: Tensor) -> None:
        self.batches.append(images)

    def finish(self) -> None:
        grid(cat(self.batches), self.columns).save(self.path, format="png")


class PngFolder:
    """000000.png, 000001.png, ... in a new folder."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path, self.count = path, 0

    def add(self, images: Tensor) -> None:
        for image in images:
            pixels = image.permute(1, 2, 0).numpy()  # (H, W, C)
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
                self.path / f"{self.count:06d}.png"
            )
            self.count += 1

    def finish(self) -> None:
        pass


class NpzFile:
    """arr_0 (N, H, W, C) uint8 and labels (N,) int64, written as they come: the same images give the same bytes."""

    def __init__(self, path: Path, labels: list[int]) -> None:
        self.archive, self.count = zipfile.ZipFile(path, "w"), len(labels)
        with self._member("labels") as file:
            np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64), allow_pickle=False)
        self.images: IO[bytes] | None = None

    def add(self, images: Tensor) -> None:
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()  # (B, H, W, C)
        if self.images is None:
            self.images = self._member("arr_0")
            shape = (self.count, *pixels.shape[1:])
            head = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self.images, head)
        self.images.write(pixels.tobytes())

    def finish(self) -> None:
        if self.images is not None:
            self.images.close()
        self.archive.close()

    def _member(self, name: str) -> IO[bytes]:
        return self.archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)
