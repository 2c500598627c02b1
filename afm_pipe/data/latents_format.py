"""Format of the latents file: layout and provenance. This module does not import torch.

    moments    (N, M, 2c, h, w) float16: mean and standard deviation, before normalization (stochastic autoencoders)
    latents    (N, M, c, h, w) float16: instead of moments, latents before normalization (deterministic autoencoders)
    mean       (c, h, w) float32, like deviation: the elementwise normalization, if the autoencoder has one
    labels     (N,) int64
    classes    (K,) class names
    done       (N,) bool: which images are encoded (all, in a complete file)
    attributes: the provenance, each a string

Moments and latents are contiguous and uncompressed: random rows of a chunked layout are a hundred times slower to read.

Legend: N images, M mirrors (2 with mirrored images, else 1), K classes; c, h, w of latents.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from afm_pipe.params import LatentSpec, Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path

if TYPE_CHECKING:
    import h5py

FORMAT_VERSION = "1"
MOMENTS, LATENTS, MEAN, STD = "moments", "latents", "mean", "deviation"
LABELS, CLASSES, DONE = "labels", "classes", "done"
REMEDY = "run `dvc repro encode` to create it again"


def create_latents_file(
    path: Path,
    spec: LatentSpec,
    num_mirrors: int,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    attributes: dict[str, str],
) -> None:
    """Create a latents file with allocated rows, to be filled in place, and an empty done map.

    Raises OSError if the disk is full.
    """
    import h5py  # where it is used: training needs no HDF5

    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_layout(h5py.h5d.CONTIGUOUS)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    try:
        with atomic_path(path) as temp, h5py.File(temp, "w", locking=False) as file:
            file.attrs.update(attributes)
            file.create_dataset(LABELS, data=labels.astype("<i8"))
            file.create_dataset(CLASSES, data=np.array([os.fsencode(name) for name in classes]))
            file.create_dataset(DONE, data=np.zeros(len(labels), bool))
            if spec.mean is not None and spec.std is not None:
                for name, values in ((MEAN, spec.mean), (STD, spec.std)):
                    file.create_dataset(name, data=values.expand(spec.shape).cpu().numpy())
            shape = len(labels), num_mirrors, *spec.encoded_shape
            file.create_dataset(MOMENTS if spec.stochastic else LATENTS, shape, "<f2", dcpl=early)
    except RuntimeError as error:  # how h5py reports a failed write on close
        raise OSError(str(error)) from None


def rows_key(file: "h5py.File") -> str:
    """Return the name of the data set that holds the rows: moments or latents."""
    return LATENTS if LATENTS in file else MOMENTS


def row_offset(dataset: "h5py.Dataset") -> int:
    """Return the byte offset of a contiguous data set in its file. Raises UserError for any other layout."""
    import h5py

    offset = dataset.id.get_offset()  # None for virtual, external, chunked and unallocated data sets
    if dataset.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS or dataset.external or offset is None:
        raise UserError(
            f"Found {dataset.name} chunked, compressed, virtual or in another file, expected one contiguous block: "
            f"{REMEDY}."
        )
    return int(offset)


def encoding_settings(params: Params) -> dict[str, str]:
    """Return the part of the provenance that params determine."""
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
    if params.data.orientation != "ignore":  # what every file without the attribute has
        decided["orientation"] = params.data.orientation
    if spec.scaling_factor is not None:
        decided["scaling_factor"] = repr(spec.scaling_factor)
    return decided


def provenance_fingerprint(provenance: dict[str, str]) -> str:
    """Return a sha256 of a provenance, which itself holds the hashes of the images and of the autoencoder."""
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()


def read_provenance(path: Path) -> dict[str, str]:
    """Return the provenance of a latents file. Raises UserError if the file is missing or not an HDF5 file."""
    with open_latents_file(path) as file:
        return read_attributes(file, path)


@contextmanager
def open_latents_file(path: Path) -> Iterator["h5py.File"]:
    """Open a latents file. Any error that HDF5 raises for damaged or malicious content becomes a UserError."""
    if not path.is_file():
        raise UserError(f"Found no {path}, expected the latents of the images: {REMEDY}.")
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:  # locks fail on NFS and Lustre
            yield file
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Found {path} cut short, or not a latents file ({error}): {REMEDY}.") from None


def read_attributes(file: "h5py.File", path: Path) -> dict[str, str]:
    """Return the attributes of a file. Raises UserError, before reading the value, for a non-string attribute."""
    import h5py

    for name in file.attrs:
        stored = file.attrs.get_id(name)
        if stored.shape != () or h5py.check_string_dtype(stored.dtype) is None:
            raise UserError(
                f"Found {path} with an attribute {name[:40]!r} of {stored.dtype} and shape {stored.shape}, expected "
                f"text: {REMEDY}."
            )
    return {name: str(value) for name, value in file.attrs.items()}
