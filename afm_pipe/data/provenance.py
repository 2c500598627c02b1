"""What a latents file says of itself, read without torch."""

from pathlib import Path

import h5py

from afm_pipe.errors import UserError


def read_provenance(path: Path) -> dict[str, str]:
    """Return the provenance of a latents file. Raises UserError when it is missing or no HDF5 file."""
    if not path.is_file():
        raise UserError(f"Found no {path}, expected the latents of the images: run `dvc repro encode`.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            return {name: str(value) for name, value in file.attrs.items()}
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"Found {path}, which is no latents file ({error}): run `dvc repro encode`.") from None
