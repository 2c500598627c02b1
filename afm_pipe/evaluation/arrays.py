"""Read named arrays of an untrusted npz file."""

import math
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from afm_pipe.runtime.errors import UserError

INFLATED, LARGEST_RATIO = (
    1 << 26,
    20,
)  # an entry may inflate to this many bytes plus this multiple of its compressed size


def load_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read named arrays, without pickle. Raises UserError for a missing or unreadable file."""
    try:
        with ZipFile(path) as archive:
            for name in names:
                _check_array(archive, f"{name}.npy")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise UserError(f"Found no {path}, expected statistics of the real images: build the reference.") from None
    except Exception as error:  # damaged or hostile bytes raise almost anything
        raise UserError(
            f"Found {path} unreadable ({error}), expected arrays {', '.join(names)}: build the reference again."
        ) from None


def _check_array(archive: ZipFile, name: str) -> None:
    """Raise ValueError for an array larger than its entry, or an entry that inflates too much."""
    entry = archive.getinfo(name)
    if entry.file_size > INFLATED + LARGEST_RATIO * entry.compress_size:
        raise ValueError(f"{name} of {entry.compress_size:,} bytes would become {entry.file_size:,}")
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(f"{name} says it is {dtype} of shape {shape}, in {entry.file_size:,} bytes")
