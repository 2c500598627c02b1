"""Format of the latents file: how it is laid out, and what a reader checks before it believes it.

    moments    (N, M, 2c, h, w) float16: mean and standard deviation, before normalization (stochastic autoencoders)
    latents    (N, M, c, h, w) float16: in place of moments, the latents before normalization (deterministic ones)
    mean       (c, h, w) float32, like deviation: normalization per element, where the autoencoder has one
    labels     (N,) int64
    classes    (K,) class names
    done       (N,) bool, which images are encoded: all of them in a complete file
    attributes: the provenance, each a string

Moments and latents are contiguous and uncompressed: random rows of a chunked layout read a hundred times slower.

Legend: N images, M mirrors (2 when mirrored images are encoded too), K classes, c, h, w of latents.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from afm_pipe.params import LatentSpec, Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path

FORMAT_VERSION = "1"
MOMENTS, LATENTS, MEAN, DEVIATION = "moments", "latents", "mean", "deviation"
LABELS, CLASSES, DONE = "labels", "classes", "done"
REMEDY = "run `dvc repro encode` to make it again"
KINDS = {"f": "float16", "i": "int64", "S": "text of one length", "b": "bool"}


class Contents(NamedTuple):
    """What a latents file holds, but for the rows themselves."""

    provenance: dict[str, str]
    stochastic: bool
    num_mirrors: int
    latent_shape: tuple[int, int, int]
    mean: NDArray[np.float32] | None  # (c, h, w)
    deviation: NDArray[np.float32] | None  # (c, h, w)
    labels: NDArray[np.int64]  # (N,)
    classes: tuple[str, ...]
    offset: int
    """Of the first row in the file, in bytes."""


def lay_out(
    path: Path,
    spec: LatentSpec,
    num_mirrors: int,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    attributes: dict[str, str],
) -> None:
    """Write a latents file without its rows, which a writer then fills in place, and with nothing done.

    Raises OSError when there is no room.
    """
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_layout(h5py.h5d.CONTIGUOUS)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    try:
        with atomic_path(path) as aside, h5py.File(aside, "w", locking=False) as file:
            file.attrs.update(attributes)
            file.create_dataset(LABELS, data=labels.astype("<i8"))
            file.create_dataset(CLASSES, data=np.array([os.fsencode(name) for name in classes]))
            file.create_dataset(DONE, data=np.zeros(len(labels), bool))
            if spec.mean is not None and spec.deviation is not None:
                for name, values in ((MEAN, spec.mean), (DEVIATION, spec.deviation)):
                    file.create_dataset(name, data=values.expand(spec.shape).cpu().numpy())
            shape = len(labels), num_mirrors, *spec.encoded_shape
            file.create_dataset(MOMENTS if spec.stochastic else LATENTS, shape, "<f2", dcpl=early)
    except RuntimeError as error:  # h5py reports a failed write on closing like this
        raise OSError(str(error)) from None


def rows_of(file: h5py.File) -> h5py.Dataset:
    """Return the data set that holds moments or latents."""
    return file[LATENTS if LATENTS in file else MOMENTS]


def row_offset(dataset: h5py.Dataset) -> int:
    """Return where a contiguous data set starts in its file, in bytes. Raises UserError on any other layout."""
    offset = dataset.id.get_offset()  # None for virtual, external, chunked and never-allocated ones
    if dataset.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS or dataset.external or offset is None:
        raise UserError(
            f"Found {dataset.name} chunked, compressed, virtual or in another file, expected one contiguous block: "
            f"{REMEDY}."
        )
    return int(offset)


def settings(params: Params) -> dict[str, str]:
    """Return the part of the provenance that params decide."""
    spec = params.latent_spec
    low, high = spec.image_range
    decided = {
        "crop": "adm",
        "input_range": f"[{low:g}, {high:g}]",
        "image_size": str(params.data.image_size),
        "channels": str(params.data.channels),
        "mirror": str(params.data.mirror).lower(),
        "precision": params.encode.precision,
        "batch_size": str(params.encode.batch_size),
    }
    if spec.scaling_factor is not None:
        decided["scaling_factor"] = repr(spec.scaling_factor)
    return decided


def provenance_fingerprint(provenance: dict[str, str]) -> str:
    """Return a sha256 over a provenance, which names the images and the autoencoder by theirs."""
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()


def read_provenance(path: Path) -> dict[str, str]:
    """Return the provenance of a latents file. Raises UserError when the file is missing or not an HDF5 file."""
    with open_checked(path) as file:
        return _read_attributes(file, path)


def read_contents(path: Path) -> Contents:
    """Read and check everything but the rows.

    Raises UserError, before it allocates anything, when the file is missing, damaged, partial or of another format.
    """
    with open_checked(path) as file:
        return _read(file, path)


@contextmanager
def open_checked(path: Path) -> Iterator[h5py.File]:
    """Open a latents file to read; whatever HDF5 makes of damaged or hostile bytes becomes a UserError."""
    if not path.is_file():
        raise UserError(f"Found no {path}, expected the latents of the images: {REMEDY}.")
    try:
        with h5py.File(path, "r", locking=False) as file:  # locks fail on NFS and Lustre
            yield file
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Found {path} cut short, or not a latents file ({error}): {REMEDY}.") from None


def _read(file: h5py.File, path: Path) -> Contents:
    rows_name = LATENTS if LATENTS in file else MOMENTS
    normalized = MEAN in file or DEVIATION in file
    kinds = {rows_name: "f", LABELS: "i", CLASSES: "S", DONE: "b"} | ({MEAN: "f", DEVIATION: "f"} if normalized else {})
    for name in kinds:
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
            raise UserError(f"Found {path} without a data set {name} of its own, expected one: {REMEDY}.")
    provenance = _read_attributes(file, path)
    version = provenance.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"Found {path} of format {version}, expected {FORMAT_VERSION}: {REMEDY}.")
    missing = {"vae_sha256", "scaling_factor", "manifest_digest"} - set(provenance)
    if missing:
        raise UserError(f"Found {path} without its provenance ({', '.join(sorted(missing))}): {REMEDY}.")
    _check_scaling_factor(provenance["scaling_factor"], path)

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
            f"Found {path} partial, with {int(done.sum())} of {num_images} images encoded: {REMEDY} (what is encoded "
            "under work/ is kept)."
        )
    if num_images == 0 or labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"Found labels outside the {len(classes)} classes in {path}, or no image: {REMEDY}.")
    _, num_mirrors, channels, height, width = rows.shape
    shape = channels // 2 if stochastic else channels, height, width
    mean, deviation = _normalization(file, shape, path) if normalized else (None, None)
    return Contents(
        provenance=provenance,
        stochastic=stochastic,
        num_mirrors=num_mirrors,
        latent_shape=shape,
        mean=mean,
        deviation=deviation,
        labels=labels,
        classes=tuple(os.fsdecode(name) for name in classes),
        offset=row_offset(rows),
    )


def _read_attributes(file: h5py.File, path: Path) -> dict[str, str]:
    """Return the attributes of a file, each a single text. Raises UserError, before reading it, for another kind."""
    for name in file.attrs:
        stored = file.attrs.get_id(name)
        if stored.shape != () or h5py.check_string_dtype(stored.dtype) is None:
            raise UserError(
                f"Found {path} with an attribute {name[:40]!r} of {stored.dtype} and shape {stored.shape}, expected "
                f"text: {REMEDY}."
            )
    return {name: str(value) for name, value in file.attrs.items()}


def _check_stored(dataset: h5py.Dataset, kind: str, path: Path, size: int) -> None:
    """Raise UserError unless a data set's values are of the kind expected, and all in this file of `size` bytes.

    A few bytes of HDF5 can declare terabytes, or values of any other file.
    """
    name = dataset.name.removeprefix("/")
    if dataset.dtype.kind != kind:
        raise UserError(
            f"Found {name} of {dataset.dtype} and shape {dataset.shape} in {path}, expected {KINDS[kind]}: {REMEDY}."
        )
    end = row_offset(dataset) + math.prod(dataset.shape) * dataset.dtype.itemsize
    if end > size:
        raise UserError(f"Found {path} cut short: {name} would end at byte {end:,} of {size:,}: {REMEDY}.")


def _check_scaling_factor(text: str, path: Path) -> None:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"Found {path} with scaling_factor {text[:40]!r}, expected a number above 0: {REMEDY}.")


def _normalization(
    file: h5py.File, shape: tuple[int, int, int], path: Path
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and deviation (c, h, w)."""
    stored = file[MEAN], file[DEVIATION]
    if any(each.shape != shape or each.dtype != "<f4" for each in stored):
        raise UserError(f"Found mean or deviation of another shape than latents {shape} in {path}: {REMEDY}.")
    mean, deviation = (each[:] for each in stored)
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation > 0).all()):
        raise UserError(f"Found mean or deviation not finite, or a deviation not above 0, in {path}: {REMEDY}.")
    return mean, deviation
