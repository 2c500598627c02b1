"""Reader of the latents file: random rows of an HDF5 file through a memory map.

Written by `afm_pipe.autoencoders.encoding`; `afm_pipe.data.latents_format` says what the file holds.

Legend: N images, K classes, B images of a batch, c, h, w of latents, e channels of what is encoded.
"""

import math
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afm_pipe.data.latents_format import REMEDY, provenance_fingerprint, read_contents, settings
from afm_pipe.data.order import ALL
from afm_pipe.params import LatentSpec, Params
from afm_pipe.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class Latents:
    """A complete latents file. In another process (forked or pickled) it maps the file again."""

    path: Path
    spec: LatentSpec
    labels: NDArray[np.int64]  # (N,)
    classes: tuple[str, ...]
    provenance: dict[str, str]
    num_mirrors: int
    _offset: int
    """Of the first row in the file, in bytes."""

    @classmethod
    def open(cls, path: Path, params: Params | None = None, autoencoder_sha256: str | None = None) -> "Latents":
        """Open a latents file and check all of it, against params and the autoencoder's weights where given.

        Raises UserError when it is missing, cut short, not such a file, partial, of another autoencoder, or made
        with other settings than params say; the message says which.
        """
        found = read_contents(path)
        mean, deviation = (None if each is None else torch.from_numpy(each) for each in (found.mean, found.deviation))
        factor = float(found.provenance["scaling_factor"])
        spec = LatentSpec(found.latent_shape, found.stochastic, factor, mean, deviation)
        latents = cls(path, spec, found.labels, found.classes, found.provenance, found.num_mirrors, found.offset)
        if params is not None:
            latents._check(params)
        made_with = found.provenance["vae_sha256"]
        if autoencoder_sha256 is not None and made_with != autoencoder_sha256:
            raise UserError(
                f"Found {path} made with the autoencoder of sha256 {made_with}, expected the one of "
                f"{autoencoder_sha256}: {REMEDY}."
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
        """Return what is stored of images `indices` in `mirrors` (B,) int: (B, e, h, w) float32, not normalized.

        That is the mean and the standard deviation of a stochastic autoencoder's latents, or the latents.
        """
        rows = np.asarray(indices) * self.num_mirrors + np.asarray(mirrors)
        self._require_unchanged()
        self._prefetch(rows)
        taken = np.take(self._rows, rows, axis=0).view("<f2").reshape(len(rows), *self.spec.encoded_shape)
        return torch.from_numpy(taken).float()

    def draw(self, indices: Tensor, generator: torch.Generator, own: slice = ALL) -> Tensor:
        """Draw normalized training latents x (B, c, h, w): a random mirror each, and a posterior sample if stochastic.

        `own` selects the rows of a batch shared by several processes: the draws are the same, no other row is read.
        """
        mirrors = torch.randint(self.num_mirrors, (len(indices),), generator=generator)
        encoded = self.read(indices[own], mirrors[own])
        if self.spec.stochastic:
            noise = torch.randn(len(indices), *self.latent_shape, generator=generator)[own]
            mean, std = encoded.chunk(2, dim=1)
            encoded = torch.addcmul(mean, std, noise)
        return self.spec.normalize(encoded)

    def fingerprint(self) -> str:
        """Return a sha256 over the provenance; no row is read."""
        return provenance_fingerprint(self.provenance)

    @cached_property
    def _rows(self) -> NDArray[np.uint8]:  # (N * mirrors, bytes of a row)
        # As bytes: after an odd number of marks moments lie at an odd place, and numpy would first copy the whole of an
        # array of such, all 42 GB of ImageNet's, before it takes a row.
        shape = self.num_images * self.num_mirrors, 2 * math.prod(self.spec.encoded_shape)
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

    def _prefetch(self, rows: NDArray[np.int64]) -> None:
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
        expected_spec = params.latent_spec
        if self.spec.stochastic != expected_spec.stochastic:
            raise UserError(
                f"Found {self.path} with {'moments' if self.spec.stochastic else 'latents'}, expected what "
                f"autoencoder.kind {params.autoencoder.kind} stores: {REMEDY}."
            )
        if self.latent_shape != expected_spec.shape:
            raise UserError(
                f"Found {self.path} with latents of shape {self.latent_shape}, expected {expected_spec.shape} "
                f"as params say: {REMEDY}."
            )
