"""Reader of the latents file: random rows of an HDF5 file through a memory map.

`afm_pipe.autoencoders.encoding` writes the file; `afm_pipe.data.latents_format` documents its layout.

Legend: N images, K classes, B batch size; c, h, w channels, height and width of a latent; e stored channels.
"""

import math
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afm_pipe.data.latents_format import (
    CLASSES,
    DONE,
    FORMAT_VERSION,
    LABELS,
    MEAN,
    MOMENTS,
    REMEDY,
    STD,
    encoding_settings,
    open_latents_file,
    provenance_fingerprint,
    read_attributes,
    row_offset,
    rows_key,
)
from afm_pipe.data.order import ALL
from afm_pipe.params import LatentSpec, Params
from afm_pipe.runtime.errors import UserError

if TYPE_CHECKING:
    import h5py

KINDS = {"f": "float16", "i": "int64", "S": "fixed-length text", "b": "bool"}


@dataclass(frozen=True, eq=False)
class Latents:
    """A complete latents file. A forked or unpickled copy maps the file again."""

    path: Path
    spec: LatentSpec
    labels: NDArray[np.int64]  # (N,)
    classes: tuple[str, ...]
    provenance: dict[str, str]
    num_mirrors: int
    _offset: int
    """Byte offset of the first row in the file."""

    @classmethod
    def open(cls, path: Path, params: Params | None = None, autoencoder_sha256: str | None = None) -> "Latents":
        """Open a latents file and check it, also against params and the hash of the autoencoder's weights if given.

        Raises UserError if the file is missing, truncated, partial, not a latents file, or made with another
        autoencoder or other settings than params; the message says which.
        """
        with open_latents_file(path) as file:
            latents = _read(file, path)
        if params is not None:
            latents._check(params)
        found = latents.provenance["vae_sha256"]
        if autoencoder_sha256 is not None and found != autoencoder_sha256:
            raise UserError(
                f"Found {path} made with an autoencoder of sha256 {found}, expected {autoencoder_sha256}: {REMEDY}."
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
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return self.spec.shape

    def read(self, indices: Any, mirrors: Any) -> Tensor:
        """Return the stored rows of images `indices` and `mirrors` (B,) int: (B, e, h, w) float32, not normalized.

        A row holds mean and standard deviation if the autoencoder is stochastic, otherwise the latent.
        """
        rows = np.asarray(indices) * self.num_mirrors + np.asarray(mirrors)
        self._require_unchanged()
        self._prefetch(rows)
        taken = np.take(self._rows, rows, axis=0).view("<f2").reshape(len(rows), *self.spec.encoded_shape)
        return torch.from_numpy(taken).float()

    def draw(self, indices: Tensor, generator: torch.Generator, shard: slice = ALL) -> Tensor:
        """Draw normalized training latents x (B, c, h, w): a random mirror of each image, sampled if stochastic.

        `shard` selects this process's part of the batch: the random draws are those of the whole batch, but only the
        rows of the shard are read.
        """
        mirrors = torch.randint(self.num_mirrors, (len(indices),), generator=generator)
        encoded = self.read(indices[shard], mirrors[shard])
        if self.spec.stochastic:
            noise = torch.randn(len(indices), *self.latent_shape, generator=generator)[shard]
            mean, std = encoded.chunk(2, dim=1)
            encoded = torch.addcmul(mean, std, noise)
        return self.spec.normalize(encoded)

    def fingerprint(self) -> str:
        """Return a sha256 of the provenance, without reading any row."""
        return provenance_fingerprint(self.provenance)

    @cached_property
    def _rows(self) -> NDArray[np.uint8]:  # (N * mirrors, bytes of a row)
        # Mapped as bytes: after a done map of odd length the rows are unaligned, and numpy would copy the whole float16
        # array (42 GB for ImageNet) to take a single row.
        shape = self.num_images * self.num_mirrors, 2 * math.prod(self.spec.encoded_shape)
        mapped = np.memmap(self._opened[0], np.uint8, "r", self._offset, shape)
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]  # rows are read in random order
        return mapped.view(np.ndarray)

    @cached_property
    def _opened(self) -> tuple[BinaryIO, os.stat_result]:
        """The mapped file, and its status when it was opened. It stays readable if another file replaces it."""
        try:
            file = self.path.open("rb")
        except PermissionError:
            raise
        except OSError as error:
            raise UserError(f"Found {self.path} gone ({error.strerror}): {REMEDY}.") from None
        return file, os.fstat(file.fileno())

    def _require_unchanged(self) -> None:
        """Raise UserError if the mapped file was truncated or modified: reading past its end would kill the process.

        A truncation between this check and the read is not noticed.
        """
        file, before = self._opened
        try:
            now = os.fstat(file.fileno())
        except OSError as error:  # a network file system lost it
            raise UserError(f"Found {self.path} gone while it was read ({error.strerror}): {REMEDY}.") from None
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UserError(
                f"Found {self.path} changed while it was read, from {before.st_size:,} to {now.st_size:,} bytes: "
                f"{REMEDY}."
            )

    def _prefetch(self, rows: NDArray[np.int64]) -> None:
        """Let the kernel read the rows of a batch in parallel instead of one by one."""
        mapped, row_bytes = self._rows.base, self._rows[:1].nbytes
        if not isinstance(mapped, np.memmap):
            return
        first = self._offset % mmap.ALLOCATIONGRANULARITY  # offset of the rows in the mapped range
        for row in rows.tolist():
            start = first + row * row_bytes
            page = start - start % mmap.PAGESIZE
            mapped._mmap.madvise(mmap.MADV_WILLNEED, page, start + row_bytes - page)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_rows", "_opened")}

    def _check(self, params: Params) -> None:
        expected_spec = params.latent_spec
        if self.spec.stochastic != expected_spec.stochastic:
            raise UserError(
                f"Found {self.path} with {'moments' if self.spec.stochastic else 'latents'}, expected what "
                f"autoencoder.kind {params.autoencoder.kind} stores: {REMEDY}."
            )
        found = {"orientation": "ignore", **self.provenance}
        for name, expected in (encoding_settings(params) | {"orientation": params.data.orientation}).items():
            if found.get(name) != expected:
                raise UserError(
                    f"Found {self.path} with {name} {found.get(name)}, expected {expected} as params say: {REMEDY}."
                )
        if self.latent_shape != expected_spec.shape:
            raise UserError(
                f"Found {self.path} with latents of shape {self.latent_shape}, expected {expected_spec.shape} "
                f"as params say: {REMEDY}."
            )


def _read(file: "h5py.File", path: Path) -> Latents:
    import h5py

    rows_name = rows_key(file)
    normalized = MEAN in file or STD in file
    kinds = {rows_name: "f", LABELS: "i", CLASSES: "S", DONE: "b"} | ({MEAN: "f", STD: "f"} if normalized else {})
    for name in kinds:
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
            raise UserError(f"Found {path} without a data set {name} of its own: {REMEDY}.")
    provenance = read_attributes(file, path)
    version = provenance.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"Found {path} of format {version}, expected {FORMAT_VERSION}: {REMEDY}.")
    missing = {"vae_sha256", "scaling_factor", "manifest_digest"} - set(provenance)
    if missing:
        raise UserError(f"Found {path} without its provenance ({', '.join(sorted(missing))}): {REMEDY}.")
    factor = _scaling_factor(provenance["scaling_factor"], path)

    size = path.stat().st_size
    for name, kind in kinds.items():
        _check_stored(file[name], kind, path, size)
    rows, labels, classes, done = file[rows_name], file[LABELS][:], file[CLASSES][:], file[DONE][:]
    stochastic = rows_name == MOMENTS
    if rows.dtype != "<f2" or rows.ndim != 5 or rows.shape[1] not in (1, 2) or (stochastic and rows.shape[2] % 2):
        channels = "2 x channels" if stochastic else "channels"
        raise UserError(
            f"Found {rows_name} of {rows.dtype} and shape {rows.shape} in {path}, expected float16 of "
            f"(images, mirrors, {channels}, height, width): {REMEDY}."
        )
    num_images = len(rows)
    if labels.dtype != "<i8" or labels.shape != (num_images,) or done.dtype != bool or done.shape != (num_images,):
        raise UserError(f"Found labels or done map of another shape than the {num_images} images in {path}: {REMEDY}.")
    if not done.all():
        raise UserError(
            f"Found {path} partial, with {int(done.sum())} of {num_images} images encoded: {REMEDY} (encoded images "
            "under work/ are kept)."
        )
    if num_images == 0 or labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"Found labels outside the {len(classes)} classes in {path}, or no image: {REMEDY}.")
    _, num_mirrors, channels, height, width = rows.shape
    shape = channels // 2 if stochastic else channels, height, width
    mean, std = _normalization(file, shape, path) if normalized else (None, None)
    return Latents(
        path=path,
        spec=LatentSpec(shape, stochastic, factor, mean, std),
        labels=labels,
        classes=tuple(os.fsdecode(name) for name in classes),
        provenance=provenance,
        num_mirrors=num_mirrors,
        _offset=row_offset(rows),
    )


def _check_stored(dataset: "h5py.Dataset", kind: str, path: Path, size: int) -> None:
    """Raise UserError unless a data set has the expected kind of values and lies within this file of `size` bytes.

    A small HDF5 file can declare terabytes, or refer to another file.
    """
    name = dataset.name.removeprefix("/")
    if dataset.dtype.kind != kind:
        raise UserError(
            f"Found {name} of {dataset.dtype} and shape {dataset.shape} in {path}, expected {KINDS[kind]}: {REMEDY}."
        )
    end = row_offset(dataset) + math.prod(dataset.shape) * dataset.dtype.itemsize
    if end > size:
        raise UserError(f"Found {path} cut short: {name} ends at byte {end:,} of {size:,}: {REMEDY}.")


def _scaling_factor(text: str, path: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"Found {path} with scaling_factor {text[:40]!r}, expected a number above 0: {REMEDY}.")
    return value


def _normalization(file: "h5py.File", shape: tuple[int, int, int], path: Path) -> tuple[Tensor, Tensor]:
    """Return mean and std (c, h, w) of the normalization."""
    if any(file[name].shape != shape or file[name].dtype != "<f4" for name in (MEAN, STD)):
        raise UserError(f"Found mean or deviation of another shape than latents {shape} in {path}: {REMEDY}.")
    mean, std = (torch.from_numpy(file[name][:]) for name in (MEAN, STD))
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(f"Found mean or deviation not finite, or a deviation not above 0, in {path}: {REMEDY}.")
    return mean, std
