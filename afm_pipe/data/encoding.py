"""Images to latents.h5: made under work/, resumable after a kill at any moment, renamed when whole.

To resume, run the same command again. The bytes of the file do not depend on where it was interrupted.

Legend: N images, M mirrors, B images of a batch, C, S channels and side of images, c, h, w of latents.
"""

import errno
import os
import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from afm_pipe.console import Tick
from afm_pipe.data.latents import CLASSES, DONE, FORMAT_VERSION, LABELS, MOMENTS, Latents, file_offset, settings
from afm_pipe.data.manifest import Manifest, image_batches, require_images
from afm_pipe.errors import UserError
from afm_pipe.files import atomic_path
from afm_pipe.fingerprint import fingerprint
from afm_pipe.lease import exclusive
from afm_pipe.models.autoencoder import check_autoencoder, encode_moments
from afm_pipe.params import Params

SECONDS_BETWEEN_SYNCS = 1.0  # of work that a kill can lose
SOURCES = ("data/encoding.py", "data/images.py", "data/latents.py", "models/autoencoder.py")


def encode_dataset(
    params: Params,
    manifest: Manifest,
    vae: AutoencoderKL,
    vae_sha256: str,
    path: Path,
    work_dir: Path,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # an immutable value
) -> Generator[Tick, None, None]:
    """Encode all images of the manifest to the latents file `path`, going on with what `work_dir` holds of it.

    A partial file of other images, settings, weights or code is thrown away. Raises UserError when images are gone or
    changed, the autoencoder does not fit params, moments are not finite, the disk is full, or another process encodes
    in `work_dir`.
    """
    check_autoencoder(vae, params)
    yield from require_images(manifest, params.data)
    vae.to(device)
    provenance = {
        "format_version": FORMAT_VERSION,
        **settings(params),
        "vae_sha256": vae_sha256,
        "scaling_factor": repr(float(vae.config.scaling_factor)),
        "image_count": str(manifest.num_images),
        "manifest_digest": manifest.digest,
    }
    with exclusive(work_dir):
        partial = work_dir / f"latents.{fingerprint(provenance, {}, SOURCES)}.h5"
        for other in set(work_dir.glob("latents.*.h5")) - {partial}:
            other.unlink()
        try:
            if not _is_readable(partial):
                _create(partial, params, manifest, provenance)
            yield from _fill(partial, params, manifest, vae)
            Latents.open(partial, params, vae_sha256)
            _publish(partial, path)
        except OSError as error:
            raise UserError(
                f"Found {work_dir} or {path.parent} not writable ({error.strerror or error}): make room there and run "
                "the same command again; it goes on where it stopped."
            ) from None


def _create(partial: Path, params: Params, manifest: Manifest, provenance: dict[str, str]) -> None:
    """Lay the whole file out, so that encoding only overwrites bytes in place and never touches HDF5's structures."""
    channels, height, width = params.latent_shape
    shape = (manifest.num_images, 2 if params.data.mirror else 1, 2 * channels, height, width)
    needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(partial.parent).free
    if free < needed:
        raise UserError(
            f"Found {free / 2**30:.1f} GiB free at {partial.parent}, expected {needed / 2**30:.1f} for the latents: "
            "make room there."
        )
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_layout(h5py.h5d.CONTIGUOUS)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    try:
        with atomic_path(partial) as aside, h5py.File(aside, "w", locking=False) as file:
            file.attrs.update(provenance)
            file.create_dataset(LABELS, data=manifest.labels.astype("<i8"))
            file.create_dataset(CLASSES, data=np.array([os.fsencode(name) for name in manifest.classes]))
            file.create_dataset(DONE, data=np.zeros(manifest.num_images, bool))
            file.create_dataset(MOMENTS, shape, "<f2", dcpl=early)
    except RuntimeError as error:  # how h5py reports a failed write on closing
        raise OSError(str(error)) from None


def _fill(partial: Path, params: Params, manifest: Manifest, vae: AutoencoderKL) -> Generator[Tick, None, None]:
    """Encode the batches that are not done: moments first, synced to disk, then their marks in the done map."""
    with h5py.File(partial, "r", locking=False) as layout:
        moments_at, done_at = file_offset(layout[MOMENTS]), file_offset(layout[DONE])
        bytes_per_image = layout[MOMENTS].dtype.itemsize * int(np.prod(layout[MOMENTS].shape[1:]))
        done = layout[DONE][:]  # (N,)
    total, size = manifest.num_images, params.encode.batch_size
    batches = [range(start, min(start + size, total)) for start in range(0, total, size)]
    pending = [batch for batch in batches if not done[batch.start : batch.stop].all()]
    encoded = total - sum(map(len, pending))
    yield Tick(encoded, total, "images", "resumed" if encoded else "")

    with partial.open("r+b") as file:
        unmarked: list[range] = []
        last_sync = time.monotonic()
        for batch, images in zip(pending, image_batches(manifest, params.data, pending), strict=True):
            moments = _moments(vae, images, params)  # (B, M, 2c, h, w)
            _require_finite(moments, batch, manifest)
            file.seek(moments_at + batch.start * bytes_per_image)
            file.write(moments.tobytes())
            unmarked.append(batch)
            if batch is pending[-1] or time.monotonic() - last_sync >= SECONDS_BETWEEN_SYNCS:
                _mark(file, done_at, unmarked)
                unmarked, last_sync = [], time.monotonic()
            encoded += len(batch)
            yield Tick(encoded, total, "images")
        _sync(file)


def _moments(vae: AutoencoderKL, images: NDArray[np.uint8], params: Params) -> NDArray[np.float16]:
    """Encode images (B, C, S, S), and their mirrors if asked, always in a batch of the full size, padded at the end."""
    padding = np.repeat(images[-1:], params.encode.batch_size - len(images), axis=0)
    batch = torch.from_numpy(np.concatenate([images, padding]))
    sides = [batch, batch.flip(-1)] if params.data.mirror else [batch]
    encoded = [torch.cat(encode_moments(vae, side, params.encode.precision), dim=1) for side in sides]
    return torch.stack(encoded, dim=1)[: len(images)].half().cpu().numpy()


def _require_finite(moments: NDArray[np.float16], batch: range, manifest: Manifest) -> None:
    bad = ~np.isfinite(moments).all(axis=(1, 2, 3, 4))  # (B,)
    if bad.any():
        path = manifest.root / manifest.paths[batch[int(bad.argmax())]]
        raise UserError(
            f"Found moments of {path} not finite in float16, expected numbers: take encode.precision fp32, or train "
            "the autoencoder again."
        )


def _mark(file: BinaryIO, done_at: int, batches: list[range]) -> None:
    _sync(file)
    for batch in batches:
        file.seek(done_at + batch.start)
        file.write(b"\1" * len(batch))
    file.flush()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _is_readable(partial: Path) -> bool:
    try:
        with h5py.File(partial, "r", locking=False) as file:
            return {MOMENTS, LABELS, CLASSES, DONE} <= set(file)
    except OSError:
        return False


def _publish(partial: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(partial, path)
    except OSError as error:
        if error.errno != errno.EXDEV:  # work/ is on another disk
            raise
        with atomic_path(path) as aside:
            shutil.copyfile(partial, aside)
        partial.unlink()
