"""Where samples go, batch by batch: a grid, numbered PNG files, or one npz.

Each is given batches (B, C, H, W) uint8 on the CPU in the order of their indices, and is finished after the last.
"""

import shutil
import zipfile
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, cat

from afm_pipe.sampling.generate import grid


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
        return self.archive.open(_entry(name), "w", force_zip64=True)


class ShuffledNpz:
    """arr_0 (N, H, W, 3) uint8 for ADM's evaluator and arr_1 (N,) their labels, in an order drawn from a seed.

    Its Inception Score is of parts in the order of the file, so samples in the order of their classes would be wrong.
    The images go to a file beside `path` as they come, and from there into the archive: they are never all in memory.
    """

    def __init__(self, path: Path, labels: list[int], seed: int) -> None:
        self.path, self.labels, self.done = path, np.asarray(labels, dtype=np.int64), 0
        self.order = np.random.default_rng(seed).permutation(len(labels))  # place in the file -> sample
        self.place = np.argsort(self.order)  # sample -> place in the file
        self.aside = path.with_name(f"{path.name}.arr_0.npy")
        self.images: np.memmap | None = None

    def add(self, images: Tensor) -> None:
        pixels = images.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        pixels = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels
        if self.images is None:
            shape = (len(self.labels), *pixels.shape[1:])
            self.images = np.lib.format.open_memmap(self.aside, mode="w+", dtype=np.uint8, shape=shape)
        self.images[self.place[self.done : self.done + len(pixels)]] = pixels
        self.done += len(pixels)

    def finish(self) -> None:
        assert self.images is not None and self.done == len(self.labels), "all images were added"
        self.images.flush()
        del self.images
        with zipfile.ZipFile(self.path, "w") as archive:
            with self.aside.open("rb") as source, archive.open(_entry("arr_0"), "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            with archive.open(_entry("arr_1"), "w") as target:
                np.lib.format.write_array(target, self.labels[self.order], allow_pickle=False)

    def close(self) -> None:
        """Remove what lies beside the archive, however it ended."""
        self.aside.unlink(missing_ok=True)


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
