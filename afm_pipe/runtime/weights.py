"""The weights folder: files of pretrained networks that users place by hand."""

import os
from pathlib import Path

from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file


def weights_file(name: str, sha256: str | None, what: str, fix: str) -> tuple[Path, str]:
    """Return a file in $AFM_WEIGHTS, default weights/, and its hash. Raises UserError if missing or of another hash."""
    path = paths.local(os.environ.get("AFM_WEIGHTS", "weights")) / name
    if not path.is_file():
        raise UserError(f"Found no {path}, expected {what} (AFM_WEIGHTS names another folder): {fix}.")
    found = sha256_file(path)
    if sha256 not in (None, found):
        raise UserError(f"Found {path} with sha256 {found}, expected {what} with sha256 {sha256}: {fix}.")
    return path, found
