"""Atomic writes, reads of bounded size, and hashes of files."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from afm_pipe.runtime.errors import UnwritableError, UserError, describe_mistake

if TYPE_CHECKING:
    from pydantic import BaseModel

Model = TypeVar("Model", bound="BaseModel")

LARGEST_JSON = 1 << 30  # bytes; the manifest of ImageNet has about 150 million
REPLACED = ".replaced.partial"  # ends the name of an old folder while a new one takes its place
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}  # the file system does not sync folders
UNWRITABLE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file or folder written there replaces `path` if the block succeeds.

    On any error or signal the temporary path is removed and `path` has its old content, or the new one if that was
    complete. Both are synced to disk, so a power cut leaves either of them. Only a process that is killed while it
    replaces a folder may leave none at `path`: the old one is then beside it, complete, and the next `atomic_path` or
    `remove_leftovers` puts it back. Raises UnwritableError if the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _temporary(path)
    _settle(path)
    _remove(temp)
    try:
        yield temp
        _sync_tree(temp)
        _replace(temp, path)
    except BaseException as error:
        _remove(temp)
        if reason := _why_unwritable(error, path, temp):
            raise UnwritableError(
                f"Found {path} not writable ({reason}): free disk space or fix the permissions, and run the same "
                "command again. The old content is intact."
            ) from None
        raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _replace(temp: Path, path: Path) -> None:
    """Rename `temp` to `path`; an old folder is renamed aside first, since a rename replaces none that has content."""
    try:
        if path.is_dir():
            os.replace(path, path.with_name(f".{path.name}{REPLACED}"))
        os.replace(temp, path)
        _sync(path.parent)
    finally:
        _settle(path)


def _settle(path: Path) -> None:
    """End the replacement of a folder: remove the old one, or put it back if there is no new one."""
    old = path.with_name(f".{path.name}{REPLACED}")
    if not os.path.lexists(old):
        return
    if os.path.lexists(path):
        temp = _temporary(path)
        os.replace(old, temp)  # first, so that no incomplete folder is ever put back
        _remove(temp)
    else:
        os.replace(old, path)


def _why_unwritable(error: BaseException, path: Path, temp: Path) -> str | None:
    """Return why a file could not be written; None for any other error, such as a denied read of another file."""
    code, name = getattr(error, "errno", None), getattr(error, "filename", None)
    if not isinstance(error, OSError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(found[1])  # safetensors raises an exception of its own
    if code not in UNWRITABLE or code is None:
        return None
    if code in (errno.EACCES, errno.EPERM) and isinstance(name, str):
        named = Path(name)
        if named not in (path, path.parent) and not named.is_relative_to(temp):
            return None
    return os.strerror(code)


def try_append(path: Path, text: str) -> None:
    """Append to a log that can be rebuilt; if the disk is full, leave the log unchanged."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        if path.exists():
            os.truncate(path, size)  # remove the incomplete line


def complete_lines(path: Path, max_bytes: int = 1 << 28) -> list[str]:
    """Return the complete lines of a growing log; the last line may still be being written.

    Returns no lines if the file is missing, unreadable, not a regular file, or larger than `max_bytes`.
    """
    try:
        if not path.is_file() or path.stat().st_size > max_bytes:
            return []
        text = path.read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text.split("\n")[:-1]


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left in `folder`, and put back what they were about to replace.

    No other process may be writing there.
    """
    for temp in [*folder.glob(".*.partial")]:
        if temp.name.endswith(REPLACED):
            _settle(temp.with_name(temp.name.removeprefix(".").removesuffix(REPLACED)))
        else:
            _remove(temp)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically. Raises ValueError for NaN, which is not JSON."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with atomic_path(path) as temp:
        temp.write_text(text)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is missing, too large, or not JSON."""
    try:
        return json.loads(read_text(path, LARGEST_JSON), parse_constant=_refuse)
    except FileNotFoundError:
        raise UserError(f"Found no {path}: run the stage that writes it, or `dvc repro`.") from None
    except (UserError, PermissionError):
        raise
    except (ValueError, RecursionError, OSError) as error:  # ValueError also for a 5,000-digit number
        raise UserError(f"Found {path}, which is not JSON ({error}): delete it and run its stage again.") from None


def json_value(path: Path, *keys: str, max_bytes: int = 1 << 24) -> Any:
    """Return the value under nested keys of a JSON file; None if the key is missing or the file cannot be read."""
    try:
        value = json.loads(read_text(path, max_bytes))
    except (OSError, ValueError, RecursionError):  # a UserError is a ValueError
        return None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_model(model: "type[Model]", path: Path, remedy: str) -> "Model":
    """Read a JSON file into a pydantic model. Raises UserError naming the file, the wrong field and the remedy."""
    from pydantic import ValidationError

    stored = read_json(path)
    try:
        return model.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        problem = f" with a wrong {field} ({describe_mistake(first)})" if field else f": {describe_mistake(first)}"
        raise UserError(f"Found {path}{problem}: {remedy}.") from None


def read_text(path: Path, max_bytes: int) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises UserError if it has more than `max_bytes` or is a pipe or device; OSError.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise UserError(f"Found {path}, which is a folder, a pipe or a device; expected a regular file.")
    if size > max_bytes:
        raise UserError(f"Found {path} of {size:,} bytes, expected at most {max_bytes:,}: check the path.")
    with path.open("rb") as file:
        return file.read(size + 1).decode("utf-8-sig")  # bounded, in case the file grows


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path]) -> str:
    """Return one hex sha256 of the names and contents of several files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    _sync(path)
