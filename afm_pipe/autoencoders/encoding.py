"""Images to latents.h5: made under work/, resumable after a kill at any moment, renamed when whole.

One process writes the whole file in place. Of several, each writes a shard: the rows of its own range of images. Shards
found at the next start, or complete at the end, are merged into the whole, which never needs to know how many
processes there were. Decoding runs ahead in threads and writing follows in one, so that the autoencoder need not wait.

To resume, run the same command again. The bytes of the file do not depend on where it was interrupted, nor on the
number of processes.

Legend: N images, M mirrors, B images of a batch, C, S channels and side of images, c, h, w of latents.
"""

import errno
import os
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from afm_pipe.autoencoders.kl import check_autoencoder, encode_moments
from afm_pipe.data.latents import CLASSES, DONE, FORMAT_VERSION, LABELS, MOMENTS, Latents, file_offset, settings
from afm_pipe.data.manifest import Manifest, image_batches, require_images
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.params import Params
from afm_pipe.params.versions import versions
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path
from afm_pipe.runtime.identity import fingerprint
from afm_pipe.runtime.lease import hold_lease
from afm_pipe.runtime.progress import Progress

SECONDS_BETWEEN_SYNCS = 1.0  # of work that a kill can lose
COPIED_AT_ONCE = 16 << 20  # bytes
FIRST = "first"  # attribute of a shard: the image of its first row


class _Rows(NamedTuple):
    """A file under work/ that holds the rows of images `first`, first + 1, ..., and where in it they lie."""

    path: Path
    first: int
    moments_at: int  # bytes
    done_at: int
    row_bytes: int
    done: NDArray[np.bool_]  # (rows,)

    @classmethod
    def of(cls, path: Path) -> "_Rows":
        with h5py.File(path, "r", locking=False) as file:
            moments = file[MOMENTS]
            row_bytes = moments.dtype.itemsize * int(np.prod(moments.shape[1:]))
            first = int(file.attrs.get(FIRST, 0))
            return cls(path, first, file_offset(moments), file_offset(file[DONE]), row_bytes, file[DONE][:])


def encode_dataset(
    params: Params,
    manifest: Manifest,
    vae: AutoencoderKL,
    vae_sha256: str,
    path: Path,
    work_dir: Path,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # an immutable value
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Generator[Progress, None, None]:
    """Encode all images of the manifest to the latents file `path`, going on with what `work_dir` holds of it.

    Every rank calls it, with the same paths on a disk they share; the first of them merges. A partial file of other
    images, settings, weights or code is thrown away. Raises UserError when images are gone or changed, the autoencoder
    does not fit params, moments are not finite, the disk is full, or another process encodes in `work_dir`.
    """
    check_autoencoder(vae, params)
    if ranks.is_main_process:
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
    partial = work_dir / f"latents.{fingerprint(provenance, {}, versions('encode'))}.h5"
    try:
        with hold_lease(work_dir) if ranks.is_main_process else nullcontext():
            if ranks.is_main_process:
                _prepare(partial, params, manifest, provenance)
            ranks.barrier()
            pending = _pending(_Rows.of(partial).done, params.encode.batch_size)
            if ranks.world_size == 1:
                yield from _fill(_Rows.of(partial), pending, params, manifest, vae)
            else:
                yield from _fill_shard(partial, pending, params, manifest, vae, ranks)
            ranks.barrier()
            if ranks.is_main_process:
                yield from _merge(partial)
                Latents.open(partial, params, vae_sha256)
                _publish(partial, path)
    except OSError as error:
        raise UserError(
            f"Found {work_dir} or {path.parent} not writable ({error.strerror or error}): make room there and run "
            "the same command again; it goes on where it stopped."
        ) from None


def _prepare(partial: Path, params: Params, manifest: Manifest, provenance: dict[str, str]) -> None:
    """See to it that the whole file is laid out and holds all that was encoded before, and remove what is not its."""
    own = {partial, *_shards(partial)}
    for other in [*(set(partial.parent.glob("latents.*.h5")) - own), *partial.parent.glob(".latents.*.partial")]:
        other.unlink()
    if not _is_readable(partial):
        _require_room(partial, manifest.num_images * _row_bytes(params))
        columns = {
            LABELS: manifest.labels.astype("<i8"),
            CLASSES: np.array([os.fsencode(name) for name in manifest.classes]),
        }
        _lay_out(partial, manifest.num_images, params, provenance, columns)
    for _ in _merge(partial):
        pass


def _lay_out(
    path: Path, rows: int, params: Params, attributes: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]
) -> None:
    """Lay a whole file out, so that encoding only overwrites bytes in place and never touches HDF5's structures."""
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_layout(h5py.h5d.CONTIGUOUS)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    try:
        with atomic_path(path) as aside, h5py.File(aside, "w", locking=False) as file:
            file.attrs.update(attributes)
            for name, column in columns.items():
                file.create_dataset(name, data=column)
            file.create_dataset(DONE, data=np.zeros(rows, bool))
            file.create_dataset(MOMENTS, (rows, *_row_shape(params)), "<f2", dcpl=early)
    except RuntimeError as error:  # how h5py reports a failed write on closing
        raise OSError(str(error)) from None


def _pending(done: NDArray[np.bool_], size: int) -> list[range]:
    """Return the batches, of `size` from the first image on, that are not done whole."""
    batches = [range(start, min(start + size, len(done))) for start in range(0, len(done), size)]
    return [batch for batch in batches if not done[batch.start : batch.stop].all()]


def _fill_shard(
    partial: Path, pending: Sequence[range], params: Params, manifest: Manifest, vae: AutoencoderKL, ranks: ProcessGroup
) -> Generator[Progress, None, None]:
    """Encode this rank's part of the pending batches into a shard beside `partial`."""
    own = pending[len(pending) * ranks.rank // ranks.world_size : len(pending) * (ranks.rank + 1) // ranks.world_size]
    if not own:
        return
    first, stop = own[0].start, own[-1].stop
    shard = partial.with_suffix(f".{first}-{stop}.h5")
    _require_room(partial, 2 * sum(map(len, pending)) * _row_bytes(params))  # until merged there are two of each row
    _lay_out(shard, stop - first, params, {FIRST: first}, {})
    yield from _fill(_Rows.of(shard), own, params, manifest, vae, f"share of rank {ranks.rank} of {ranks.world_size}")


def _fill(
    rows: _Rows, pending: Sequence[range], params: Params, manifest: Manifest, vae: AutoencoderKL, facts: str = ""
) -> Generator[Progress, None, None]:
    """Encode batches into a file; while one is encoded, the next are decoded and the one before it is written."""
    remaining = sum(map(len, pending))
    total = remaining if facts else len(rows.done)
    encoded = total - remaining
    yield Progress(encoded, total, "images", facts or ("resumed" if encoded else ""))

    with rows.path.open("r+b") as file, ThreadPoolExecutor(1) as writer:
        journal, writing = _Journal(file, rows, manifest), None
        for batch, images in zip(pending, image_batches(manifest, params.data, pending), strict=True):
            moments = _moments(vae, images, params)  # (B, M, 2c, h, w); a GPU still computes it
            if writing is not None:
                encoded += writing.result()
                yield Progress(encoded, total, "images", facts)
            writing = writer.submit(journal.add, batch, moments)
        if writing is not None:
            encoded += writing.result()
        journal.mark()
        _sync(file)
    if pending:
        yield Progress(encoded, total, "images", facts)


class _Journal:
    """Writes moments into a file and, once they are safe on disk, their marks into its done map."""

    def __init__(self, file: BinaryIO, rows: _Rows, manifest: Manifest) -> None:
        self.file, self.rows, self.manifest = file, rows, manifest
        self._unmarked: list[range] = []
        self._last_sync = time.monotonic()

    def add(self, batch: range, moments: Tensor) -> int:
        """Write a batch's moments (B, M, 2c, h, w); return how many images that were."""
        values = moments.cpu().numpy()
        _require_finite(values, batch, self.manifest)
        self.file.seek(self.rows.moments_at + (batch.start - self.rows.first) * self.rows.row_bytes)
        self.file.write(values.tobytes())
        self._unmarked.append(batch)
        if time.monotonic() - self._last_sync >= SECONDS_BETWEEN_SYNCS:
            self.mark()
        return len(batch)

    def mark(self) -> None:
        """Mark what was written so far."""
        if self._unmarked:
            places = [range(batch.start - self.rows.first, batch.stop - self.rows.first) for batch in self._unmarked]
            _mark(self.file, self.rows.done_at, places)
        self._unmarked, self._last_sync = [], time.monotonic()


def _moments(vae: AutoencoderKL, images: NDArray[np.uint8], params: Params) -> Tensor:
    """Encode images (B, C, S, S), and their mirrors if asked, always in a batch of the full size, padded at the end."""
    padding = np.repeat(images[-1:], params.encode.batch_size - len(images), axis=0)
    batch = torch.from_numpy(np.concatenate([images, padding]))
    sides = [batch, batch.flip(-1)] if params.data.mirror else [batch]
    encoded = [torch.cat(encode_moments(vae, side, params.encode.precision), dim=1) for side in sides]
    return torch.stack(encoded, dim=1)[: len(images)].half()


def _require_finite(moments: NDArray[np.float16], batch: range, manifest: Manifest) -> None:
    bad = ~np.isfinite(moments).all(axis=(1, 2, 3, 4))  # (B,)
    if bad.any():
        path = manifest.root / manifest.paths[batch[int(bad.argmax())]]
        raise UserError(
            f"Found moments of {path} not finite in float16, expected numbers: take encode.precision fp32, or train "
            "the autoencoder again."
        )


def _mark(file: BinaryIO, done_at: int, places: Sequence[range]) -> None:
    _sync(file)
    for place in places:
        file.seek(done_at + place.start)
        file.write(b"\1" * len(place))
    file.flush()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _merge(partial: Path) -> Generator[Progress, None, None]:
    """Move what shards hold into the whole file. Killed in between, a shard is still there and is moved again."""
    shards = _shards(partial)
    for number, path in enumerate(shards):
        yield Progress(number, len(shards), "shards", "merging")
        whole, shard = _Rows.of(partial), _Rows.of(path)
        with partial.open("r+b") as file, path.open("rb") as source:
            moved = list(_runs(shard.done))
            for run in moved:
                source.seek(shard.moments_at + run.start * shard.row_bytes)
                file.seek(whole.moments_at + (shard.first + run.start) * shard.row_bytes)
                _copy(source, file, len(run) * shard.row_bytes)
            _mark(file, whole.done_at, [range(shard.first + run.start, shard.first + run.stop) for run in moved])
            _sync(file)
        path.unlink()


def _runs(done: NDArray[np.bool_]) -> Iterator[range]:
    """Yield the ranges of rows that are done."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], done, [False]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2).tolist():
        yield range(start, stop)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        piece = source.read(min(count, COPIED_AT_ONCE))
        if not piece:
            raise OSError(errno.EIO, f"{source.name} ends too soon")
        target.write(piece)
        count -= len(piece)


def _shards(partial: Path) -> list[Path]:
    return sorted(partial.parent.glob(f"{partial.stem}.*-*.h5"))


def _row_shape(params: Params) -> tuple[int, int, int, int]:
    channels, height, width = params.latent_shape
    return 2 if params.data.mirror else 1, 2 * channels, height, width


def _row_bytes(params: Params) -> int:
    return 2 * int(np.prod(_row_shape(params)))


def _require_room(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if free < needed:
        raise UserError(
            f"Found {free / 2**30:.1f} GiB free at {partial.parent}, expected {needed / 2**30:.1f} for the latents: "
            "make room there."
        )


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
