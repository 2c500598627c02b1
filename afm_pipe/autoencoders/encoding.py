"""Encode images to latents.h5: written under work/, resumable after a kill at any moment, renamed when complete.

The processes encode batches in turn, and the main process writes them in place into a single file. Images are decoded
ahead in threads and rows are written in another thread, so that the autoencoder waits for neither.

To resume, run the same command again. The bytes of the file depend neither on interruptions nor on the number of
processes.

Legend: N images, M mirrors, B batch size; C, S channels and side of images; e, h, w shape of an encoding.
"""

import errno
import os
import shutil
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.data.latents import Latents
from afm_pipe.data.latents_format import (
    CLASSES,
    DONE,
    FORMAT_VERSION,
    LABELS,
    create_latents_file,
    encoding_settings,
    row_offset,
    rows_key,
)
from afm_pipe.data.manifest import Manifest
from afm_pipe.data.reading import image_batches, require_images
from afm_pipe.distributed.mapping import map_across_ranks
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.params import Params
from afm_pipe.params.versions import versions
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, remove_leftovers
from afm_pipe.runtime.identity import fingerprint
from afm_pipe.runtime.lease import hold_lease
from afm_pipe.runtime.progress import Progress

SECONDS_BETWEEN_SYNCS = 1.0  # the work that a kill can lose


def encode_dataset(
    params: Params,
    manifest: Manifest,
    autoencoder: Autoencoder,
    autoencoder_sha256: str,
    path: Path,
    work_dir: Path,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Generator[Progress, None, None]:
    """Encode all images of the manifest to the latents file `path`, resuming from a partial file in `work_dir`.

    All processes must call this, with the same paths on a shared disk. Raises UserError if images are missing or
    changed, the autoencoder does not match params, a latent is not finite, the disk is full, or another process encodes
    in `work_dir`.
    """
    autoencoder.check(params)
    if group.is_main_process:
        yield from require_images(manifest, params.data)
    provenance = provenance_of(params, manifest, autoencoder, autoencoder_sha256)
    partial = work_dir / partial_name(provenance)
    try:
        with hold_lease(work_dir) if group.is_main_process else nullcontext():
            if group.is_main_process:
                _prepare(partial, params, manifest, autoencoder, provenance)
            group.barrier()
            yield from _fill(_PartialFile.of(partial), params, manifest, autoencoder, group)
            if group.is_main_process:
                Latents.open(partial, params, autoencoder_sha256)
                _publish(partial, path)
    except OSError as error:
        raise UserError(
            f"Found {work_dir} or {path.parent} not writable ({error.strerror or error}): free disk space and run "
            "the same command again to resume."
        ) from None


def provenance_of(
    params: Params, manifest: Manifest, autoencoder: Autoencoder, autoencoder_sha256: str
) -> dict[str, str]:
    """Return the provenance of the latents file: settings, image count, and hashes of images and autoencoder."""
    return {
        "format_version": FORMAT_VERSION,
        **encoding_settings(params),
        "vae_sha256": autoencoder_sha256,
        "scaling_factor": repr(autoencoder.spec.scaling_factor),
        "image_count": str(manifest.num_images),
        "manifest_digest": manifest.digest,
    }


def partial_name(provenance: dict[str, str]) -> str:
    """Return the name of the partial file with a provenance, for the current code versions."""
    return f"latents.{fingerprint(provenance, {}, versions('encode'))}.h5"


class _PartialFile(NamedTuple):
    """Layout of a partial latents file."""

    path: Path
    rows_offset: int  # bytes
    done_offset: int
    row_bytes: int  # of an image with its mirror
    done: NDArray[np.bool_]  # (N,)

    @classmethod
    def of(cls, path: Path) -> "_PartialFile":
        with h5py.File(path, "r", locking=False) as file:
            rows = file[rows_key(file)]
            row_bytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:]))
            return cls(path, row_offset(rows), row_offset(file[DONE]), row_bytes, file[DONE][:])

    def pending(self, size: int) -> list[range]:
        """Return the batches of `size` images, aligned to the first image, that are not complete."""
        count = len(self.done)
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        return [batch for batch in batches if not self.done[batch.start : batch.stop].all()]


def _prepare(
    partial: Path, params: Params, manifest: Manifest, autoencoder: Autoencoder, provenance: dict[str, str]
) -> None:
    """Create the partial file unless there is one."""
    remove_leftovers(partial.parent)
    if not _is_readable(partial):
        num_mirrors = 2 if params.data.mirror else 1
        row_bytes = 2 * num_mirrors * int(np.prod(autoencoder.spec.encoded_shape))
        _require_disk_space(partial, manifest.num_images * row_bytes)
        create_latents_file(partial, autoencoder.spec, num_mirrors, manifest.labels, manifest.classes, provenance)


def _fill(
    layout: _PartialFile, params: Params, manifest: Manifest, autoencoder: Autoencoder, group: ProcessGroup
) -> Generator[Progress, None, None]:
    """Encode the pending batches; meanwhile images are decoded ahead and the previous batch is written."""
    pending = layout.pending(params.encode.batch_size)
    total = len(layout.done)
    encoded = total - sum(map(len, pending))
    local = pending[group.rank :: group.world_size]
    with closing(image_batches(manifest, params.data, local)) as images:

        def encode(batch: range) -> list[Tensor]:
            return [_encoded(autoencoder, next(images), params)]  # (B, M, e, h, w); a GPU still computes it

        batches = map_across_ranks(pending, encode, group)
        if not group.is_main_process:
            for _ in batches:
                pass
            return
        yield Progress(encoded, total, "images", "resumed" if encoded else "")
        with layout.path.open("r+b") as file, ThreadPoolExecutor(1) as writer:
            row_writer, writing = _RowWriter(file, layout, manifest), None
            for batch, (values,) in batches:
                if writing is not None:
                    encoded += writing.result()
                    yield Progress(encoded, total, "images")
                writing = writer.submit(row_writer.add, batch, values)
            if writing is not None:
                encoded += writing.result()
            row_writer.mark()
            _sync(file)
    if pending:
        yield Progress(encoded, total, "images")


class _RowWriter:
    """Writes encoded images into a latents file and, once they are synced to disk, marks them in its done map."""

    def __init__(self, file: BinaryIO, layout: _PartialFile, manifest: Manifest) -> None:
        self.file, self.layout, self.manifest = file, layout, manifest
        self._unmarked: list[range] = []
        self._last_sync = time.monotonic()

    def add(self, batch: range, encoded: Tensor) -> int:
        """Write a batch (B, M, e, h, w) float16; return its number of images."""
        values = encoded.cpu().numpy()
        _require_finite(values, batch, self.manifest)
        self.file.seek(self.layout.rows_offset + batch.start * self.layout.row_bytes)
        self.file.write(values.tobytes())
        self._unmarked.append(batch)
        if time.monotonic() - self._last_sync >= SECONDS_BETWEEN_SYNCS:
            self.mark()
        return len(batch)

    def mark(self) -> None:
        """Mark the images written so far as done."""
        if self._unmarked:
            _sync(self.file)
            for batch in self._unmarked:
                self.file.seek(self.layout.done_offset + batch.start)
                self.file.write(b"\1" * len(batch))
            self.file.flush()
        self._unmarked, self._last_sync = [], time.monotonic()


def _encoded(autoencoder: Autoencoder, images: NDArray[np.uint8], params: Params) -> Tensor:
    """Encode images (B, C, S, S), and their mirrors if data.mirror, in a batch padded to the full size."""
    padding = np.repeat(images[-1:], params.encode.batch_size - len(images), axis=0)
    batch = torch.from_numpy(np.concatenate([images, padding]))
    sides = [batch, batch.flip(-1)] if params.data.mirror else [batch]
    encoded = [autoencoder.encode(side, params.encode.precision) for side in sides]
    return torch.stack(encoded, dim=1)[: len(images)].half()


def _require_finite(encoded: NDArray[np.float16], batch: range, manifest: Manifest) -> None:
    bad = ~np.isfinite(encoded).all(axis=(1, 2, 3, 4))  # (B,)
    if bad.any():
        path = manifest.root / manifest.paths[batch[int(bad.argmax())]]
        raise UserError(
            f"Found the encoding of {path} not finite in float16: set encode.precision to fp32, or train "
            "the autoencoder again."
        )


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _require_disk_space(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if free < needed:
        raise UserError(
            f"Found {free / 2**30:.1f} GiB free at {partial.parent}, expected {needed / 2**30:.1f} for the latents: "
            "free disk space there."
        )


def _is_readable(partial: Path) -> bool:
    try:
        with h5py.File(partial, "r", locking=False) as file:
            return {LABELS, CLASSES, DONE, rows_key(file)} <= set(file)
    except OSError:
        return False


def _publish(partial: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(partial, path)
    except OSError as error:
        if error.errno != errno.EXDEV:  # work/ is on another disk
            raise
        with atomic_path(path) as temp:
            shutil.copyfile(partial, temp)
        partial.unlink()
