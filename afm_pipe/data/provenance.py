"""What a latents file says of itself, read without torch."""

from pathlib import Path

import h5py

from afm_pipe.runtime.errors import UserError


def read_provenance(path: Path) -> dict[str, str]:
    """Return the provenance of a latents file. Raises UserError when it is missing or no HDF5 file."""
    if not path.is_file():
        raise UserError(f"Found no {path}, expected the latents of the images: run `dvc repro encode`.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            return read_attributes(file, path)
    except UserError:
        raise
    except Exception as error:  # whatever HDF5 makes of damaged or hostile bytes
        raise UserError(f"Found {path}, which is no latents file ({error}): run `dvc repro encode`.") from None


def read_attributes(file: h5py.File, path: Path) -> dict[str, str]:
    """Return the attributes of a file, each a single text. Raises UserError, before reading it, for another kind."""
    for name in file.attrs:
        stored = file.attrs.get_id(name)
        if stored.shape != () or h5py.check_string_dtype(stored.dtype) is None:
            raise UserError(
                f"Found {path} with an attribute {name[:40]!r} of {stored.dtype} and shape {stored.shape}, expected "
                "text: run `dvc repro encode` to make it again."
            )
    return {name: str(value) for name, value in file.attrs.items()}
