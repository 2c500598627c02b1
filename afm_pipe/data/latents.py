"""The latents file: moments of every image's latent in one HDF5 file, read through a memory map.

    moments  (N, M, 2c, h, w) float16, contiguous and uncompressed: mean and standard deviation, before scaling
    labels   (N,) int64
    classes  (K,) class names
    done     (N,) bool, which images are encoded: all of them in a whole file
    attributes: the provenance, each a string

Written by `afm_pipe.autoencoders.encoding`. Contiguous: random rows of a chunked layout read a hundred times slower.

Legend: N images, M mirrors (2 when mirrored ones are encoded too), K classes, B images of a batch, c, h, w of latents.
"""

import hashlib
import json
import math
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afm_pipe.data.order import ALL
from afm_pipe.data.provenance import read_attributes
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError

FORMAT_VERSION = "1"
MOMENTS, LABELS, CLASSES, DONE = "moments", "labels", "classes", "done"
REMEDY = "run `dvc repro encode` to make it again"
KINDS = {"f": "float16", "i": "int64", "S": "text of one length", "b": "bool"}


@dataclass(frozen=True, eq=False)
class Latents:
    """A whole latents file. Handed to another process (forked or pickled) it maps the file there anew."""

    path: Path
    labels: NDArray[np.int64]  # (N,)
    classes: tuple[str, ...]
    provenance: dict[str, str]
    num_mirrors: int
    latent_shape: tuple[int, int, int]
    _offset: int
    """Of the first moment in the file, in bytes."""

    @classmethod
    def open(cls, path: Path, params: Params | None = None, vae_sha256: str | None = None) -> "Latents":
        """Open a latents file and check it whole, against params and the autoencoder's weights where given.

        Raises UserError when it is missing, cut short, not such a file, partial, of another autoencoder, or made
        with other settings than params say; the message says which.
        """
        if not path.is_file():
            raise UserError(f"Found no {path}, expected the latents of the images: {REMEDY}.")
        try:
            with h5py.File(path, "r", locking=False) as file:  # locks fail on NFS and Lustre
                latents = _read(cls, path, file)
        except UserError:
            raise
        except Exception as error:  # whatever HDF5 makes of damaged or hostile bytes
            raise UserError(f"Found {path} cut short, or not a latents file ({error}): {REMEDY}.") from None
        if params is not None:
            latents._check(params)
        found = latents.provenance["vae_sha256"]
        if vae_sha256 is not None and found != vae_sha256:
            raise UserError(
                f"Found {path} made with the autoencoder of sha256 {found}, expected the one of {vae_sha256}: {REMEDY}."
            )
        return latents

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    @property
    def scaling_factor(self) -> float:
        """Factor that brings sampled latents to about unit variance."""
        return float(self.provenance["scaling_factor"])

    def moments(self, indices: Any, mirrors: Any) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (B, c, h, w) float32 each, of images `indices` in `mirrors` (B,) int."""
        rows = np.asarray(indices) * self.num_mirrors + np.asarray(mirrors)
        self._require_unchanged()
        self._ask_for(rows)
        channels, height, width = self.latent_shape
        taken = np.take(self._rows, rows, axis=0).view("<f2").reshape(len(rows), 2 * channels, height, width)
        mean, std = torch.from_numpy(taken).float().chunk(2, dim=1)
        return mean, std

    def draw(self, indices: Tensor, generator: torch.Generator, own: slice = ALL) -> Tensor:
        """Draw training latents x (B, c, h, w): a mirror each where there are, a posterior sample, scaled.

        Of a batch that several ranks share, `own` says which are wanted: the draws are the same, no others are read.
        """
        mirrors = torch.randint(self.num_mirrors, (len(indices),), generator=generator)
        mean, std = self.moments(indices[own], mirrors[own])
        noise = torch.randn(len(indices), *self.latent_shape, generator=generator)[own]
        return torch.addcmul(mean, std, noise) * self.scaling_factor

    def fingerprint(self) -> str:
        """Return a sha256 over the provenance, which names the images and the autoencoder by theirs; reads nothing."""
        return hashlib.sha256(json.dumps(self.provenance, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _rows(self) -> NDArray[np.uint8]:  # (N * M, bytes of a row)
        # As bytes: after an odd number of marks moments lie at an odd place, and numpy would first copy the whole of an
        # array of such, all 42 GB of ImageNet's, before it takes a row.
        shape = self.num_images * self.num_mirrors, 2 * 2 * math.prod(self.latent_shape)
        mapped = np.memmap(self._opened[0], np.uint8, "r", self._offset, shape)
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]  # reading ahead of a row is in vain
        return mapped.view(np.ndarray)

    @cached_property
    def _opened(self) -> tuple[BinaryIO, os.stat_result]:
        """The file that is mapped, and what it was then. It stays readable when its name is given to another one."""
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise UserError(f"Found {self.path} gone ({error.strerror}): {REMEDY}.") from None
        return file, os.fstat(file.fileno())

    def _require_unchanged(self) -> None:
        """Raise UserError when the mapped file was cut short or written to: past its end, reading kills the process.

        Asked before every batch; only a cut that falls between this and the reading of that batch is not noticed.
        """
        file, before = self._opened
        try:
            now = os.fstat(file.fileno())
        except OSError as error:  # a server that no longer has it
            raise UserError(f"Found {self.path} gone while it was read ({error.strerror}): {REMEDY}.") from None
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UserError(
                f"Found {self.path} changed while it was read, from {before.st_size:,} to {now.st_size:,} bytes: "
                f"{REMEDY}."
            )

    def _ask_for(self, rows: NDArray[np.int64]) -> None:
        """Let the kernel read all of a batch's rows that are not in memory at once, instead of one after the other."""
        mapped, row_bytes = self._rows.base, self._rows[:1].nbytes
        if not isinstance(mapped, np.memmap):
            return
        first = self._offset % mmap.ALLOCATIONGRANULARITY  # where rows begin in what is mapped
        for row in rows.tolist():
            start = first + row * row_bytes
            page = start - start % mmap.PAGESIZE
            mapped._mmap.madvise(mmap.MADV_WILLNEED, page, start + row_bytes - page)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_rows", "_opened")
        }  # mapped anew, not copied

    def _check(self, params: Params) -> None:
        for name, expected in settings(params).items():
            if self.provenance.get(name) != expected:
                raise UserError(
                    f"Found {self.path} with {name} {self.provenance.get(name)}, expected {expected} as params say: "
                    f"{REMEDY}."
                )
        if self.latent_shape != params.latent_shape:
            raise UserError(
                f"Found {self.path} with latents of shape {self.latent_shape}, expected {params.latent_shape} "
                f"as params say: {REMEDY}."
            )


def settings(params: Params) -> dict[str, str]:
    """Return the part of the provenance that params decide."""
    decided = {
        "crop": "adm",
        "input_range": "[-1, 1]",
        "image_size": str(params.data.image_size),
        "channels": str(params.data.channels),
        "mirror": str(params.data.mirror).lower(),
        "precision": params.encode.precision,
        "batch_size": str(params.encode.batch_size),
    }
    if params.autoencoder.scaling_factor != "measured":
        decided["scaling_factor"] = repr(params.autoencoder.scaling_factor)
    return decided


def file_offset(dataset: h5py.Dataset) -> int:
    """Return where a contiguous data set starts in its file. Raises UserError on any other layout."""
    offset = dataset.id.get_offset()  # None for virtual, external, chunked and never-allocated ones
    if dataset.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS or dataset.external or offset is None:
        raise UserError(
            f"Found {dataset.name} chunked, compressed, virtual or in another file, expected one contiguous block: "
            f"{REMEDY}."
        )
    return int(offset)


def _check_stored(dataset: h5py.Dataset, kind: str, path: Path, size: int) -> None:
    """Raise UserError unless a data set's values are of the kind expected, and all in this file of `size` bytes.

    A few bytes of HDF5 can declare terabytes, or values of any other file.
    """
    name = dataset.name.removeprefix("/")
    if dataset.dtype.kind != kind:
        raise UserError(
            f"Found {name} of {dataset.dtype} and shape {dataset.shape} in {path}, expected {KINDS[kind]}: {REMEDY}."
        )
    end = file_offset(dataset) + math.prod(dataset.shape) * dataset.dtype.itemsize
    if end > size:
        raise UserError(f"Found {path} cut short: {name} would end at byte {end:,} of {size:,}: {REMEDY}.")


def _read(cls: type[Latents], path: Path, file: h5py.File) -> Latents:
    for name in (MOMENTS, LABELS, CLASSES, DONE):
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
            raise UserError(f"Found {path} without a data set {name} of its own, expected one: {REMEDY}.")
    provenance = read_attributes(file, path)
    version = provenance.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"Found {path} of format {version}, expected {FORMAT_VERSION}: {REMEDY}.")
    missing = {"vae_sha256", "scaling_factor", "manifest_digest"} - set(provenance)
    if missing:
        raise UserError(f"Found {path} without its provenance ({', '.join(sorted(missing))}): {REMEDY}.")

    size = path.stat().st_size
    for name, kinds in ((MOMENTS, "f"), (LABELS, "i"), (CLASSES, "S"), (DONE, "b")):  # before anything is allocated
        _check_stored(file[name], kinds, path, size)
    moments, labels, classes, done = file[MOMENTS], file[LABELS][:], file[CLASSES][:], file[DONE][:]
    if moments.dtype != "<f2" or moments.ndim != 5 or moments.shape[1] not in (1, 2) or moments.shape[2] % 2:
        raise UserError(
            f"Found moments of {moments.dtype} and shape {moments.shape} in {path}, expected float16 of "
            f"(images, mirrors, 2 x channels, height, width): {REMEDY}."
        )
    num_images = len(moments)
    if labels.dtype != "<i8" or labels.shape != (num_images,) or done.dtype != bool or done.shape != (num_images,):
        raise UserError(f"Found labels or done map of another shape than the {num_images} images in {path}: {REMEDY}.")
    if not done.all():
        raise UserError(
            f"Found {path} partial, with {int(done.sum())} of {num_images} images encoded: {REMEDY} (what is encoded "
            "under work/ is kept)."
        )
    if num_images == 0 or labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"Found labels outside the {len(classes)} classes in {path}, or no image: {REMEDY}.")
    try:
        scaling = float(provenance["scaling_factor"])
    except ValueError:
        scaling = math.nan
    if not (math.isfinite(scaling) and scaling > 0):
        raise UserError(
            f"Found {path} with scaling_factor {provenance['scaling_factor'][:40]!r}, expected a number above 0: "
            f"{REMEDY}."
        )
    _, num_mirrors, twice, height, width = moments.shape
    return cls(
        path=path,
        labels=labels,
        classes=tuple(os.fsdecode(name) for name in classes),
        provenance=provenance,
        num_mirrors=num_mirrors,
        latent_shape=(twice // 2, height, width),
        _offset=file_offset(moments),
    )
